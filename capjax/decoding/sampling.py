"""Choosing the next token: greedy or by temperature, per-row keys, and its log-probability.

Log-probabilities are of the model's own distribution over the vocabulary, divided by the
temperature in the logits: the one that training and scoring use, so a caption's log-probability is
its score. A caption's ids are 1 .. vocab_size - 1: padding (which no label ever asks for), the mask
row and the columns that pad the vocabulary are never chosen. All of it is float32, whatever the
model computes in.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Key

from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.dims import Array, Bool, Float, Int, PRNGKeyArray


def log_distribution(
    logits_BV: Float[Array, "B V"], vocab_size: int, temperature: float | Float[Array, ""] = 1.0
) -> Float[Array, "B V"]:
    """log softmax(logits / temperature) over the ids below vocab_size; -inf beyond."""
    is_token_V = jnp.arange(logits_BV.shape[1]) < vocab_size
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    return jax.nn.log_softmax(jnp.where(is_token_V[None, :], logits_BV, -jnp.inf), axis=-1)


def choosable(
    logprobs_BV: Float[Array, "B V"], ban_eos: bool | Bool[Array, ""] = False
) -> Float[Array, "B V"]:
    """The log-probabilities with -inf at what may not be chosen: padding, and EOS if banned."""
    ids_V = jnp.arange(logprobs_BV.shape[1])
    banned_V = (ids_V == PAD_ID) | ((ids_V == EOS_ID) & ban_eos)
    return jnp.where(banned_V[None, :], -jnp.inf, logprobs_BV)


def greedy(logprobs_BV: Float[Array, "B V"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The most probable token of each row (the lowest id in a tie), and its log-probability."""
    return jnp.argmax(logprobs_BV, axis=-1).astype(jnp.int32), jnp.max(logprobs_BV, axis=-1)


def sample(
    logprobs_BV: Float[Array, "B V"], key_B: Key[Array, "B"]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One draw from each row with that row's own key, and its log-probability."""

    def draw(key, logprobs_V):
        # Gumbel-max. The log-probability is picked by a mask rather than a gather, which needs
        # neither a collective nor a sharding rule when the rows are split over a mesh.
        token = jnp.argmax(logprobs_V + jax.random.gumbel(key, logprobs_V.shape))
        is_chosen_V = jnp.arange(logprobs_V.shape[0]) == token
        return token.astype(jnp.int32), jnp.max(jnp.where(is_chosen_V, logprobs_V, -jnp.inf))

    return jax.vmap(draw)(key_B, logprobs_BV)


def row_keys(key: PRNGKeyArray, index_B: Int[Array, "B"]) -> Key[Array, "B"]:
    """One key a row, from the input's index alone: neither batch nor mesh changes the draws."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_B)


def step_keys(key_B: Key[Array, "B"], step: int | Int[Array, ""]) -> Key[Array, "B"]:
    """The rows' keys for position `step` of the caption."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_B, step)
