"""Greedy decoding and sampling: each row writes its own text."""

from typing import NamedTuple

import jax.numpy as jnp

from capjax.data.tokenizer import PAD_ID
from capjax.decoding import sampling
from capjax.decoding.texts import LENGTH, Position, Texts, entropies, no_texts, write
from capjax.dims import Array, Bool, Float, Int


class State(NamedTuple):
    """Rows in which the texts are written."""

    texts: Texts
    last_BS: Int[Array, "B S"]  # the decoder's next inputs
    ancestors_BSL: None = None  # rows go on from themselves


def start(batch: int, rules, mask_B: Bool[Array, "B"], config) -> State:
    """Before the first position, whose input is PAD: it doubles as the beginning."""
    del config
    texts = no_texts(batch, rules.num_rows, rules.max_length, mask_B)
    return State(texts, jnp.zeros_like(texts.finish_BS) + PAD_ID)


def advance(state: State, position: Position, keys_BS, numbers, rules) -> State:
    """One more token in each row that goes on."""
    del numbers
    if rules.method == "greedy":
        token_BS = sampling.greedy(position.scores_BSV)
    else:
        token_BS = sampling.draw(position.scores_BSV, sampling.step_keys(keys_BS, position.index))
    logprob_BS = sampling.pick(position.logprobs_BSV, token_BS)
    texts = write(state.texts, position, token_BS, logprob_BS, entropies(position))
    return State(texts, token_BS)


def is_over(state: State) -> Bool[Array, "B S"]:
    """Which rows are done."""
    return state.texts.finish_BS != LENGTH


def finish(state: State, numbers, rules) -> tuple[Texts, Float[Array, "B S"]]:
    """The texts, and their summed log-probabilities."""
    del numbers, rules
    return state.texts, jnp.sum(state.texts.logprobs_BSL, axis=-1)
