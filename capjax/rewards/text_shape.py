"""Guards against captions that please a reward by their shape: too long, too short, repetitive.

Both are from -1, the worst, to 0, and read token ids alone. Letters: B images, K captions an image,
L positions; I and J places of an n-gram.
"""

import jax.numpy as jnp

from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.dims import Array, Float, Int
from capjax.errors import UserError


def length_penalty(
    tokens_BKL: Int[Array, "B K L"], shortest: int, longest: int, tolerance: float = 10.0
) -> Float[Array, "B K"]:
    """0 from `shortest` to `longest` tokens, the end included; beyond falling to -1.

    It falls evenly with the distance, by 1 / `tolerance` a token, and no further than -1. Raises
    `UserError` where the range is empty or the tolerance not positive.
    """
    if not 0 <= shortest <= longest:
        raise UserError(
            f"shortest={shortest}, longest={longest}: expected 0 or more, the second no less"
        )
    if not tolerance > 0:
        raise UserError(f"tolerance={tolerance}: expected tokens, more than 0")
    count_BK = jnp.sum(tokens_BKL != PAD_ID, -1, dtype=jnp.float32)
    beyond_BK = jnp.maximum(jnp.maximum(shortest - count_BK, count_BK - longest), 0)
    return -jnp.minimum(beyond_BK / tolerance, 1.0)


def repetition_penalty(tokens_BKL: Int[Array, "B K L"], order: int = 2) -> Float[Array, "B K"]:
    """-(the share of a caption's n-grams of `order` tokens that stood in it before).

    The end is no part of them. 0 where a caption is shorter than `order` tokens. Raises `UserError`
    for an order below 1.
    """
    if order < 1:
        raise UserError(f"order={order}: expected tokens of an n-gram, 1 or more")
    length = tokens_BKL.shape[-1]
    num_places = max(length - order + 1, 0)
    starts = [tokens_BKL[..., start : start + num_places] for start in range(order)]
    is_ngram_BKI = starts[-1] > EOS_ID  # its last token is one, and so are those before
    is_before_IJ = jnp.arange(num_places)[:, None] > jnp.arange(num_places)[None]
    is_seen_BKIJ = jnp.broadcast_to(is_before_IJ, (*is_ngram_BKI.shape, num_places))
    for token_BKI in starts:
        is_seen_BKIJ &= token_BKI[..., :, None] == token_BKI[..., None, :]
    repeated_BK = jnp.sum(jnp.any(is_seen_BKIJ, -1) & is_ngram_BKI, -1)
    return -repeated_BK / jnp.maximum(jnp.sum(is_ngram_BKI, -1), 1)
