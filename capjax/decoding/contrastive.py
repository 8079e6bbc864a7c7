"""Contrastive search (Su et al. 2022): probable tokens whose states are unlike the earlier ones.

The candidates for a position are the rows of an image: the decoder reads all of them, and the state
after each is compared with those of the text before it. So a token is settled one position later
than it is proposed; the last one, which nothing is read after, is the most probable.
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
from capjax.mesh import act_BL, act_BLD, out_sharding


class State(NamedTuple):
    """Texts of an image that differ in their last token, the candidate."""

    texts: Texts
    last_BS: Int[Array, "B S"]  # the candidates, which are the decoder's next inputs
    ancestors_BSL: Int[Array, "B S L"]
    prob_BS: Float[Array, "B S"]  # of the candidates; 0 where a token may not be chosen
    states_BLE: Float[Array, "B L E"]  # of the settled text, of length 1
    is_over_B: Bool[Array, "B"]


def start(batch: int, rules, mask_B: Bool[Array, "B"], config) -> State:
    """Before the first position all rows are the same."""
    texts = no_texts(batch, rules.num_rows, rules.max_length, mask_B)
    zero_BS = jnp.zeros_like(texts.finish_BS)
    shape = (batch, rules.max_length, config.decoder_width)
    return State(
        texts=texts,
        last_BS=zero_BS + PAD_ID,
        ancestors_BSL=_spread(jnp.arange(rules.num_rows)[None, :, None], texts.tokens_BSL.shape),
        prob_BS=zero_BS + 1.0,
        states_BLE=jnp.zeros(shape, out_sharding=out_sharding(act_BLD)),
        is_over_B=texts.finish_BS[:, 0] == ABSENT,
    )


def advance(state: State, position: Position, keys_BS, numbers, rules) -> State:
    """Settles one of the candidates, and proposes those of the next position."""
    del keys_BS
    index = position.index
    hidden_BSE = position.hidden_BSE.astype(jnp.float32)
    hidden_BSE /= jnp.linalg.norm(hidden_BSE, axis=-1, keepdims=True)
    settled_B1 = _settle(state, hidden_BSE, index, numbers.penalty_alpha)
    hidden_B1E = take_rows(hidden_BSE, settled_B1)
    states_BLE = lax.dynamic_update_slice_in_dim(state.states_BLE, hidden_B1E, index, axis=1)

    scores_B1V, logprobs_B1V, entropy_B1 = take_rows(
        (position.scores_BSV, position.logprobs_BSV, entropies(position)), settled_B1
    )
    score_BkS, token_BkS = sampling.top_tokens(scores_B1V, rules.num_rows)
    total_B11 = jax.nn.logsumexp(scores_B1V, axis=-1, keepdims=True)
    logprob_BkS = jnp.take_along_axis(logprobs_B1V, token_BkS, axis=-1)
    settled_BS = _spread(settled_B1, state.last_BS.shape)
    before = take_rows(state.texts, settled_BS)
    texts = write(
        before, position, token_BkS[:, 0], logprob_BkS[:, 0], _spread(entropy_B1, settled_BS.shape)
    )
    positions_L = jnp.arange(rules.max_length)[None, None, :]
    ancestors_BSL = jnp.where(positions_L == index, settled_BS[:, :, None], state.ancestors_BSL)
    return State(
        texts=texts,
        last_BS=token_BkS[:, 0],
        ancestors_BSL=ancestors_BSL,
        prob_BS=jnp.exp(score_BkS - total_B11)[:, 0],
        states_BLE=states_BLE,
        is_over_B=before.finish_BS[:, 0] != LENGTH,
    )


def is_over(state: State) -> Bool[Array, "B"]:
    """Which images' texts have ended and are settled."""
    return state.is_over_B


def finish(state: State, numbers, rules) -> tuple[Texts, Float[Array, "B S"]]:
    """The text with the most probable last token, and its summed log-probability."""
    del numbers, rules
    texts = jax.tree.map(lambda x: x[:, :1], state.texts)
    return texts, jnp.sum(texts.logprobs_BSL, axis=-1)


def _settle(state: State, hidden_BSE: Array, index: Array, alpha: Array) -> Int[Array, "B 1"]:
    """The row with the best (1 - alpha) * probability - alpha * greatest cosine (ibid., eq. 5)."""
    cosine_BSL = jnp.einsum("BSE,BLE->BSL", hidden_BSE, state.states_BLE)
    is_past_L = jnp.arange(cosine_BSL.shape[2]) < index
    cosine_BSL = jnp.where(is_past_L[None, None, :], cosine_BSL, -1.0)
    value_BS = (1 - alpha) * state.prob_BS - alpha * jnp.max(cosine_BSL, axis=-1)
    value_BS = jnp.where(state.prob_BS > 0, value_BS, -jnp.inf)
    return jnp.argmax(value_BS, axis=1, keepdims=True)


def _spread(x: Array, shape: tuple[int, ...]) -> Array:
    spec = act_BLD if len(shape) == 3 else act_BL
    return jnp.broadcast_to(x, shape, out_sharding=out_sharding(spec))
