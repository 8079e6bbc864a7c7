"""Beam search, and diverse beam search in groups that avoid each other's tokens.

Beams are rows of an image; the keys and values of a beam's past stay in the rows that wrote them
(`ancestors_BSL`). What ends is kept apart: the best ended texts of each group, as many as beams.
C are the candidates for the next beams, twice as many, so that enough are left if some end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from capjax.data.tokenizer import PAD_ID
from capjax.decoding import sampling
from capjax.decoding.texts import (
    ABSENT,
    LENGTH,
    Position,
    Texts,
    entropies,
    no_texts,
    take_rows,
    write,
)
from capjax.dims import Array, Bool, Float, Int
from capjax.mesh import act_BLD, out_sharding


class State(NamedTuple):
    """Beams under way, and what has ended; groups follow one another along S."""

    texts: Texts
    last_BS: Int[Array, "B S"]
    ancestors_BSL: Int[Array, "B S L"]
    total_BS: Float[Array, "B S"]  # summed scores; -inf where there is no beam
    ended: Texts
    ended_score_BS: Float[Array, "B S"]  # total / length ** length_penalty; -inf where empty
    is_over_BS: Bool[Array, "B S"]  # whether the row's group is


def start(batch: int, rules, mask_B: Bool[Array, "B"], config) -> State:
    """One beam a group before the first position."""
    del config
    texts = no_texts(batch, rules.num_rows, rules.max_length, mask_B)
    zero_BS = jnp.zeros_like(texts.finish_BS)
    is_first_S = jnp.arange(rules.num_rows) % (rules.num_rows // rules.num_beam_groups) == 0
    return State(
        texts=texts,
        last_BS=zero_BS + PAD_ID,
        ancestors_BSL=_own_rows(texts.tokens_BSL, 0),
        total_BS=zero_BS + jnp.where(is_first_S, 0.0, -jnp.inf)[None, :],
        ended=texts,
        ended_score_BS=zero_BS - jnp.inf,
        is_over_BS=texts.finish_BS == ABSENT,
    )


def advance(state: State, position: Position, keys_BS, numbers, rules) -> State:
    """One more token in each beam; group after group, each knowing what those before it took."""
    del keys_BS
    entropy_BS = entropies(position)
    size = rules.num_rows // rules.num_beam_groups
    groups: list[State] = []
    for first in range(0, rules.num_rows, size):
        rows = slice(first, first + size)
        scores_BSV = position.scores_BSV[:, rows]
        if groups:
            taken_BS = jnp.concatenate([group.last_BS for group in groups], axis=1)
            times_B1V = _count(taken_BS, scores_BSV.shape[-1])
            penalty_B1V = jnp.where(
                position.is_forced_B[:, None, None], 0.0, numbers.diversity_penalty * times_B1V
            )
            scores_BSV = scores_BSV - penalty_B1V
        part = position._replace(logprobs_BSV=position.logprobs_BSV[:, rows], scores_BSV=scores_BSV)
        group = jax.tree.map(lambda x, rows=rows: x[:, rows], state)
        groups.append(_advance_group(group, part, entropy_BS[:, rows], first, numbers, rules))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *groups)


def is_over(state: State) -> Bool[Array, "B S"]:
    """Which rows' groups have found their captions."""
    return state.is_over_BS


def finish(state: State, numbers, rules) -> tuple[Texts, Float[Array, "B S"]]:
    """The best texts of all groups, the best first.

    Beams that were cut at max_length stand beside what has ended, unless the group was over.
    """
    cut_BS = _score(state.total_BS, rules.max_length, numbers)
    cut_BS = jnp.where(state.is_over_BS, -jnp.inf, cut_BS)
    is_absent_BS = state.texts.finish_BS == ABSENT
    score_BC = jnp.concatenate([state.ended_score_BS, cut_BS], axis=1)
    texts = _concatenate(state.ended, state.texts)
    score_BS, row_BS = lax.top_k(score_BC, rules.num_rows)
    texts = take_rows(texts, row_BS)
    finish_BS = jnp.where(score_BS == -jnp.inf, ABSENT, texts.finish_BS)
    score_BS = jnp.where(is_absent_BS, 0.0, score_BS)
    return texts._replace(finish_BS=finish_BS), score_BS


def _advance_group(
    state: State, position: Position, entropy_BS: Array, first_row: int, numbers, rules
) -> State:
    size = state.last_BS.shape[1]
    total_BC, parent_BC, token_BC = _candidates(state.total_BS, position.scores_BSV)
    vocabulary = position.logprobs_BSV.shape[-1]
    logprobs_BX = position.logprobs_BSV.reshape(len(total_BC), size * vocabulary)
    logprob_BC = jnp.take_along_axis(logprobs_BX, parent_BC * vocabulary + token_BC, axis=1)
    candidates = write(
        take_rows(state.texts, parent_BC),
        position,
        token_BC,
        logprob_BC,
        take_rows(entropy_BS, parent_BC),
    )
    goes_on_BC = candidates.finish_BS == LENGTH

    # As in Hugging Face: what ends counts if no more than `size` candidates are better.
    may_end_C = jnp.arange(total_BC.shape[1]) < size
    score_BC = _score(total_BC, position.index + 1, numbers)
    score_BC = jnp.where(~goes_on_BC & may_end_C[None, :], score_BC, -jnp.inf)
    score_BC = jnp.where(state.is_over_BS[:, :1], -jnp.inf, score_BC)
    score_BX = jnp.concatenate([state.ended_score_BS, score_BC], axis=1)
    ended_score_BS, row_BS = lax.top_k(score_BX, size)
    ended = take_rows(_concatenate(state.ended, candidates), row_BS)

    total_BS, row_BS = lax.top_k(jnp.where(goes_on_BC, total_BC, -jnp.inf), size)
    parent_BS = jnp.take_along_axis(parent_BC, row_BS, axis=1)
    ancestors_BSL = take_rows(state.ancestors_BSL, parent_BS)
    is_future_L = jnp.arange(ancestors_BSL.shape[2]) > position.index
    own_BSL = _own_rows(ancestors_BSL, first_row)
    is_over_BS = state.is_over_BS | _is_over(total_BS, ended_score_BS, position, numbers, rules)
    return State(
        texts=take_rows(candidates, row_BS),
        last_BS=jnp.take_along_axis(token_BC, row_BS, axis=1),
        ancestors_BSL=jnp.where(is_future_L[None, None, :], own_BSL, ancestors_BSL),
        total_BS=total_BS,
        ended=ended,
        ended_score_BS=ended_score_BS,
        is_over_BS=is_over_BS,
    )


def _candidates(total_BS: Array, scores_BSV: Array) -> tuple[Array, Array, Array]:
    """(total, parent row in the group, token) of the 2S best continuations, the best first."""
    size = total_BS.shape[1]
    score_BSC, token_BSC = sampling.top_tokens(scores_BSV, 2 * size)
    total_BSC = total_BS[:, :, None] + score_BSC
    flat = (len(total_BS), size * 2 * size)
    total_BC, place_BC = lax.top_k(total_BSC.reshape(flat), 2 * size)
    token_BC = jnp.take_along_axis(token_BSC.reshape(flat), place_BC, axis=1)
    return total_BC, place_BC // (2 * size), token_BC


def _is_over(total_BS, ended_score_BS, position: Position, numbers, rules) -> Bool[Array, "B 1"]:
    """Whether the group has as many ended texts as beams, and need not go on."""
    worst_B1 = ended_score_BS[:, -1:]
    is_full_B1 = worst_B1 > -jnp.inf
    if rules.early_stopping is True:
        return is_full_B1
    length = position.index + 1
    if rules.early_stopping == "never":  # the length at which a total counts most
        length = jnp.where(numbers.length_penalty > 0, rules.max_length, length + 1)
    return is_full_B1 & (worst_B1 >= _score(total_BS[:, :1], length, numbers))


def _score(total: Array, length: Array | int, numbers) -> Array:
    return total / jnp.asarray(length, jnp.float32) ** numbers.length_penalty


def _count(token_BS: Int[Array, "B S"], size: int) -> Float[Array, "B 1 V"]:
    """How often each id is among the tokens."""
    is_token_BSV = token_BS[:, :, None] == jnp.arange(size)[None, None, :]
    return jnp.sum(is_token_BSV, axis=1, keepdims=True, dtype=jnp.float32)


def _own_rows(like_BSL: Int[Array, "B S L"], first_row: int) -> Int[Array, "B S L"]:
    rows_S = first_row + jnp.arange(like_BSL.shape[1])
    return jnp.broadcast_to(
        rows_S[None, :, None], like_BSL.shape, out_sharding=out_sharding(act_BLD)
    )


def _concatenate(*texts: Texts) -> Texts:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *texts)
