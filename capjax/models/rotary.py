"""Rotary positions: queries and keys turned by angles that grow with their position.

Their products then depend on the distance of two positions alone (Su et al. 2021, RoFormer). The
two halves of a head are the two coordinates of each turned pair, as in GPT-NeoX and in clip-jax.
"""

import jax.numpy as jnp
import numpy as np

from capjax.dims import Array, Float, Int


def rotate(
    x_BLNK: Float[Array, "B L N K"], position: Int[Array, "*B L"] | None = None
) -> Float[Array, "B L N K"]:
    """Turns positions p, by default 0 .. L-1, by the angles p * 10000 ** (-2k / K), in float32.

    `position` is that of each place [L], or of each place of each row [B, L].
    """
    half = x_BLNK.shape[-1] // 2
    frequency_H = 10_000.0 ** -(np.arange(half, dtype=np.float32) / half)
    position = jnp.arange(x_BLNK.shape[1]) if position is None else position
    position_BL = position if position.ndim == 2 else position[None]
    angle_BL1H = position_BL.astype(jnp.float32)[:, :, None, None] * frequency_H[None, None, None]
    cos_BL1H, sin_BL1H = jnp.cos(angle_BL1H), jnp.sin(angle_BL1H)
    a_BLNH, b_BLNH = jnp.split(x_BLNK.astype(jnp.float32), 2, axis=-1)
    turned = (a_BLNH * cos_BL1H - b_BLNH * sin_BL1H, b_BLNH * cos_BL1H + a_BLNH * sin_BL1H)
    return jnp.concatenate(turned, axis=-1).astype(x_BLNK.dtype)
