"""Rewards brought to one scale before they are weighed and added.

Sums of rewards on scales of their own are ruled by the one that spreads most; each is therefore
normalised alone, then mixed. Letters: B images, K captions an image.
"""

import jax.numpy as jnp

from capjax.dims import Array, Bool, Float
from capjax.errors import UserError

KINDS = ("none", "batch", "group")
FLOOR = 1e-3


def normalize(
    reward_BK: Float[Array, "B K"],
    kind: str = "batch",
    mask_B: Bool[Array, "B"] | None = None,
    *,
    floor: float = FLOOR,
) -> Float[Array, "B K"]:
    """The reward less its mean, over its standard deviation.

    Args:
      kind: "batch": mean and deviation of all captions of the global batch; "group": of the
        captions of each image, so that only what differs among them is left; "none": as it came.
      mask_B: False for rows that only fill the batch: they count for nothing and become 0.
      floor: in the reward's unit. A smaller deviation counts as this much, or captions that are
        almost equally good would be set as far apart as any.

    The deviation is that of the captions at hand (divided by their number, not by one less).
    Equal rewards become 0 exactly. Raises `UserError` for another kind, or a floor of 0 or less.
    """
    if kind not in KINDS:
        raise UserError(f"normalize={kind!r}: choose one of {', '.join(KINDS)}")
    if not floor > 0:
        raise UserError(f"floor={floor}: expected more than 0, such as {FLOOR}")
    is_valid_BK = jnp.ones_like(reward_BK, bool)
    if mask_B is not None:
        is_valid_BK &= mask_B[:, None]
    reward_BK = jnp.where(is_valid_BK, reward_BK, 0)
    if kind == "none":
        return reward_BK
    axis = 1 if kind == "group" else (0, 1)
    count = jnp.maximum(jnp.sum(is_valid_BK, axis, keepdims=True), 1)
    # Differences from the largest: rounding leaves equal rewards no deviation.
    largest = jnp.max(reward_BK, axis, keepdims=True, where=is_valid_BK, initial=-jnp.inf)
    below_BK = jnp.where(is_valid_BK, reward_BK - largest, 0)
    mean = jnp.sum(below_BK, axis, keepdims=True) / count
    centred_BK = jnp.where(is_valid_BK, below_BK - mean, 0)
    deviation = jnp.sqrt(jnp.sum(centred_BK**2, axis, keepdims=True) / count)
    return centred_BK / jnp.maximum(deviation, floor)
