"""Position embeddings for another image size or text length than they were trained for."""

import numpy as np

from capjax.dims import Float
from capjax.errors import UserError


def resize_position_embedding(
    posemb_PD: Float[np.ndarray, "P D"], old_grid: int, new_grid: int
) -> Float[np.ndarray, "Q D"]:
    """Bilinear between the patches of a square grid, corners onto corners; the same where equal.

    As big_vision resizes on loading: `scipy.ndimage.zoom(order=1)` over rows and columns.

    Args:
      posemb_PD: of the patches row by row, `old_grid` squared of them.
      old_grid: patches along a side.
      new_grid: likewise, of the result.
    """
    if len(posemb_PD) != old_grid**2:
        raise UserError(f"{len(posemb_PD)} position embeddings: expected {old_grid} x {old_grid}")
    if new_grid == old_grid:
        return posemb_PD
    weights = _linear_weights(old_grid, new_grid)
    grid_HWD = posemb_PD.reshape(old_grid, old_grid, -1)
    resized = np.einsum("ih,jw,hwd->ijd", weights, weights, grid_HWD, optimize=True)
    return resized.reshape(new_grid**2, -1).astype(posemb_PD.dtype)


def _linear_weights(old: int, new: int) -> np.ndarray:
    """(new, old) weights of linear interpolation, first point onto first and last onto last."""
    at = np.linspace(0, old - 1, new)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)[None, :]))


def resize_text_positions(
    posemb_LD: Float[np.ndarray, "L D"], length: int, policy: str = "error"
) -> Float[np.ndarray, "M D"]:
    """Position embeddings for `length` tokens.

    Args:
      policy: "error" refuses another length (big_vision never resizes text). "keep" keeps the
        positions there are: it cuts the last ones off, or repeats the last one.
    """
    if policy not in ("error", "keep"):
        raise UserError(f"policy={policy!r}: choose 'error' or 'keep'")
    old = len(posemb_LD)
    if length == old:
        return posemb_LD
    if policy == "error":
        raise UserError(f"text_length={length}, but the weights have {old} positions: use {old}")
    return posemb_LD[np.minimum(np.arange(length), old - 1)]
