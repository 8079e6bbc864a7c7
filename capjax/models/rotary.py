"""Rotary positions: queries and keys turned by angles that grow with their position.

Their products then depend on the distance of two positions alone (Su et al. 2021, RoFormer). The
two halves of a head are the two coordinates of each turned pair, as in GPT-NeoX and in clip-jax.
"""

import jax.numpy as jnp
import numpy as np

from capjax.dims import Array, Float, Int


def rotate(
    x_BLNK: Float[Array, "B L N K"], position_L: Int[Array, "L"] | None = None
) -> Float[Array, "B L N K"]:
    """Turns positions p, by default 0 .. L-1, by the angles p * 10000 ** (-2k / K), in float32."""
    half = x_BLNK.shape[-1] // 2
    frequency_H = 10_000.0 ** -(np.arange(half, dtype=np.float32) / half)
    position_L = jnp.arange(x_BLNK.shape[1]) if position_L is None else position_L
    angle_L1H = position_L.astype(jnp.float32)[:, None, None] * frequency_H[None, None, :]
    cos_1L1H, sin_1L1H = jnp.cos(angle_L1H)[None], jnp.sin(angle_L1H)[None]
    a_BLNH, b_BLNH = jnp.split(x_BLNK.astype(jnp.float32), 2, axis=-1)
    turned = (a_BLNH * cos_1L1H - b_BLNH * sin_1L1H, b_BLNH * cos_1L1H + a_BLNH * sin_1L1H)
    return jnp.concatenate(turned, axis=-1).astype(x_BLNK.dtype)
