"""Choosing the next token: distributions, the most probable tokens, draws with per-row keys.

Log-probabilities are of the model's own distribution over the vocabulary, divided by the
temperature in the logits: the one that training and scoring use, so a caption's log-probability is
its score. A caption's ids are 1 .. vocab_size - 1: padding (which no label ever asks for), the mask
row and the columns that pad the vocabulary are never chosen. All of it is float32, whatever the
model computes in. S are the rows of an image, which are written side by side.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Key

from capjax.dims import Array, Float, Int, PRNGKeyArray, UInt

BLOCK = 128  # the vocabulary is padded to a multiple of it


def log_distribution(
    logits_BSV: Float[Array, "B S V"], vocab_size: int, temperature: float | Float[Array, ""] = 1.0
) -> Float[Array, "B S V"]:
    """log softmax(logits / temperature) over the ids below vocab_size; -inf beyond."""
    is_token_V = jnp.arange(logits_BSV.shape[-1]) < vocab_size
    logits_BSV = logits_BSV.astype(jnp.float32) / temperature
    return jax.nn.log_softmax(jnp.where(is_token_V[None, None, :], logits_BSV, -jnp.inf), axis=-1)


def entropy(logprobs_BSV: Float[Array, "B S V"]) -> Float[Array, "B S"]:
    """Nats; what has no probability adds nothing."""
    is_possible_BSV = logprobs_BSV > -jnp.inf
    terms_BSV = jnp.where(is_possible_BSV, jnp.exp(logprobs_BSV) * logprobs_BSV, 0.0)
    return -jnp.sum(terms_BSV, axis=-1)


def top_tokens(
    scores_BSV: Float[Array, "B S V"], k: int
) -> tuple[Float[Array, "B S k"], Int[Array, "B S k"]]:
    """The k highest scores of each row and their ids, the highest first.

    A score among the k highest lies in one of the k blocks with the highest maxima, so two passes
    are enough; XLA:CPU sorts a whole vocabulary for `lax.top_k`.
    """
    *rows, size = scores_BSV.shape
    num_blocks = size // BLOCK
    if num_blocks <= max(k, 2) or size % BLOCK:
        score_BSk, token_BSk = lax.top_k(scores_BSV, k)
        return score_BSk, token_BSk
    blocks_BSMU = scores_BSV.reshape(*rows, num_blocks, BLOCK)
    maxima_BSM = jnp.max(blocks_BSMU, axis=-1)
    if k == 1:
        block_BSk = jnp.argmax(maxima_BSM, axis=-1, keepdims=True)
    else:
        block_BSk = jnp.sort(lax.top_k(maxima_BSM, k)[1], axis=-1)  # a tie goes to the lowest id
    found_BSkU = jnp.take_along_axis(blocks_BSMU, block_BSk[..., None], axis=-2)
    candidates_BSC = found_BSkU.reshape(*rows, k * BLOCK)
    if k == 1:
        place_BSk = jnp.argmax(candidates_BSC, axis=-1, keepdims=True)
        score_BSk = jnp.max(candidates_BSC, axis=-1, keepdims=True)
    else:
        score_BSk, place_BSk = lax.top_k(candidates_BSC, k)
    block_BSk = jnp.take_along_axis(block_BSk, place_BSk // BLOCK, axis=-1)
    return score_BSk, (block_BSk * BLOCK + place_BSk % BLOCK).astype(jnp.int32)


def greedy(scores_BSV: Float[Array, "B S V"]) -> Int[Array, "B S"]:
    """The token with the highest score of each row (the lowest id in a tie)."""
    return top_tokens(scores_BSV, 1)[1][..., 0]


def draw(scores_BSV: Float[Array, "B S V"], key_BS: Key[Array, "B S"]) -> Int[Array, "B S"]:
    """One draw from each row's softmax(scores) with that row's own key.

    By the inverse of the cumulative probability, first of blocks of tokens, then of the tokens of
    one: a single random number a row, where the Gumbel maximum takes one a token.
    """
    *rows, size = scores_BSV.shape
    width = BLOCK if size % BLOCK == 0 else size
    blocks_BSMU = scores_BSV.reshape(*rows, size // width, width)
    highest_BS11 = jnp.max(blocks_BSMU, axis=(-2, -1), keepdims=True)
    mass_BSMU = jnp.exp(blocks_BSMU - highest_BS11)
    until_BSM = jnp.cumsum(jnp.sum(mass_BSMU, axis=-1), axis=-1)
    # In [0, 1 - 2 ** -23], so that the product is less than the sum of all.
    uniform_BS = jax.vmap(jax.vmap(jax.random.uniform))(key_BS)
    sought_BS1 = uniform_BS[..., None] * until_BSM[..., -1:]
    block_BS1 = jnp.argmax(until_BSM > sought_BS1, axis=-1, keepdims=True)
    before_BSM = jnp.pad(until_BSM, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    within_BS1 = sought_BS1 - jnp.take_along_axis(before_BSM, block_BS1, axis=-1)
    mass_BSU = jnp.take_along_axis(mass_BSMU, block_BS1[..., None], axis=-2)[..., 0, :]
    # Rounding may leave nothing beyond what is sought, or seek less than 0: then what has no mass
    # must not be taken all the same.
    is_beyond_BSU = jnp.cumsum(mass_BSU, axis=-1) > jnp.maximum(within_BS1, 0.0)
    token_BS = jnp.where(
        jnp.any(is_beyond_BSU, axis=-1),
        jnp.argmax(is_beyond_BSU, axis=-1),
        jnp.argmax(mass_BSU, axis=-1),
    )
    return (block_BS1[..., 0] * width + token_BS).astype(jnp.int32)


def pick(logprobs_BSV: Float[Array, "B S V"], token_BS: Int[Array, "B S"]) -> Float[Array, "B S"]:
    """The log-probability of each row's token."""
    return jnp.take_along_axis(logprobs_BSV, token_BS[..., None], axis=-1)[..., 0]


def keep_top_k(scores_BSV: Float[Array, "B S V"], top_k: int) -> Float[Array, "B S V"]:
    """-inf at all but the k highest scores of each row, and what equals the k-th."""
    least_BS1 = top_tokens(scores_BSV, min(top_k, scores_BSV.shape[-1]))[0][..., -1:]
    return jnp.where(scores_BSV < least_BS1, -jnp.inf, scores_BSV)


def keep_top_p(scores_BSV: Float[Array, "B S V"], top_p: Float[Array, ""]) -> Float[Array, "B S V"]:
    """-inf at all but the fewest most probable tokens that together have probability `top_p`.

    Tokens as probable as the least of them stay too (Holtzman et al. 2020). The least probability
    kept is found by bisection over the bits of float32, whose order is that of the numbers.
    """
    probs_BSV = jax.nn.softmax(scores_BSV, axis=-1)

    def halve(_, bounds):
        low_BS1, high_BS1 = bounds  # what is at least as probable as `low` has top_p, `high` not
        middle_BS1 = low_BS1 + (high_BS1 - low_BS1) // 2
        least_BS1 = lax.bitcast_convert_type(middle_BS1, jnp.float32)
        kept_BSV = jnp.where(probs_BSV >= least_BS1, probs_BSV, 0.0)
        is_enough_BS1 = jnp.sum(kept_BSV, axis=-1, keepdims=True) >= top_p
        return (
            jnp.where(is_enough_BS1, middle_BS1, low_BS1),
            jnp.where(is_enough_BS1, high_BS1, middle_BS1),
        )

    highest_BS1 = jnp.max(probs_BSV, axis=-1, keepdims=True)
    high_BS1 = lax.bitcast_convert_type(highest_BS1, jnp.int32) + 1
    low_BS1, _ = lax.fori_loop(0, 31, halve, (jnp.zeros_like(high_BS1), high_BS1))
    least_BS1 = lax.bitcast_convert_type(low_BS1, jnp.float32)
    return jnp.where(probs_BSV < least_BS1, -jnp.inf, scores_BSV)


def keep_min_p(scores_BSV: Float[Array, "B S V"], min_p: Float[Array, ""]) -> Float[Array, "B S V"]:
    """-inf where a token is less than `min_p` times as probable as the most probable one.

    Nguyen et al. 2024, "Turning up the heat: min-p sampling".
    """
    highest_BS1 = jnp.max(scores_BSV, axis=-1, keepdims=True)
    return jnp.where(scores_BSV < highest_BS1 + jnp.log(min_p), -jnp.inf, scores_BSV)


def truncate(scores_BSV: Float[Array, "B S V"], numbers, rules) -> Float[Array, "B S V"]:
    """Scores of what may be drawn, in Hugging Face's order: top-k, top-p, min-p.

    `rules` say which of them there are, `numbers` the thresholds.
    """
    if rules.top_k:
        scores_BSV = keep_top_k(scores_BSV, rules.top_k)
    if rules.has_top_p:
        scores_BSV = keep_top_p(scores_BSV, numbers.top_p)
    if rules.has_min_p:
        scores_BSV = keep_min_p(scores_BSV, numbers.min_p)
    return scores_BSV


def row_keys(
    key: PRNGKeyArray, index_B: Int[Array, "B"] | UInt[Array, "B"], num_rows: int = 1
) -> Key[Array, "B S"]:
    """One key a row, from the input's index and the row's alone: batch and mesh change no draw."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    key_B = fold(key, index_B)
    return jax.vmap(fold, in_axes=(0, None))(key_B, jnp.arange(num_rows))


def step_keys(key_BS: Key[Array, "B S"], step: int | Int[Array, ""]) -> Key[Array, "B S"]:
    """The rows' keys for position `step` of the caption."""
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, step)))(key_BS)
