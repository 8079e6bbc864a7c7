"""Walking over all pairs of two sets of rows, a tile at a time, on one device or round a mesh.

Each device keeps its own images and, over the steps, sees every device's texts: the blocks of texts
go round a ring of all devices, and what is gathered for a text goes round with it and comes home.
No device ever holds more than one tile of the pairs.

Letters: B images of one device, T texts of one device (those of image i are the `per_image` rows
from i * per_image on), R image rows and C text rows of a tile.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from capjax.dims import Array, Bool
from capjax.mesh import BATCH, reshard

# A ring of up to this many devices is written out step by step, which lets compilers overlap steps.
# XLA on CPUs, moreover, does not order collectives inside a loop against those outside it, and
# devices that meet them in different orders wait for each other for ever.
MAX_UNROLLED = 16


class Pairs(NamedTuple):
    """Which pairs of a tile are what."""

    is_positive_RC: Bool[Array, "R C"] | None  # the text is a caption of the image; None: no pair
    is_new_RC: Bool[Array, "R C"] | None  # not yet seen; None: all are new


# (rows_R, columns_C, pairs, of_rows_R, of_columns_C) -> (of_rows_R, of_columns_C) with the tile in.
Tile = Callable[[tuple, tuple, Pairs, tuple, tuple], tuple[tuple, tuple]]


def per_device(function: Callable, rows: tuple, shared: tuple):
    """`function(axes, *rows, *shared)` on each device's part of `rows`, split over the batch axes.

    `axes` are those to give to `walk`. What `function` returns leads with its part of the rows.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function((), *rows, *shared)
    specs = [P(BATCH, *(None,) * (x.ndim - 1)) for x in rows] + [P() for _ in shared]
    arguments = [reshard(x, spec) for x, spec in zip((*rows, *shared), specs, strict=True)]
    device = jax.shard_map(
        lambda *arguments: function(BATCH, *arguments), in_specs=tuple(specs), out_specs=P(BATCH)
    )
    return device(*arguments)


class Start(NamedTuple):
    """An array to gather in, one entry an image or text: float32, all `value` at first."""

    value: float
    shape: tuple[int, ...] = ()  # of an entry


def walk(
    tile: Tile,
    rows: tuple,
    columns: tuple,
    of_rows: tuple[Start, ...],
    of_columns: tuple[Start, ...],
    *,
    per_image: int,
    size: int,
    axes: tuple[str, ...],
) -> tuple[tuple, tuple]:
    """(of_rows, of_columns): what `tile` gathers for each image and each text over all pairs.

    Args:
      rows: arrays [B, ...] of the images; columns: arrays [T, ...] of the texts.
      size: the most rows and columns of a tile.
      axes: the mesh axes round which the texts go; none outside `shard_map`.
    """
    gathered = _begin(of_rows, len(rows[0]), axes), _begin(of_columns, len(columns[0]), axes)
    num_devices = lax.axis_size(axes) if axes else 1
    to_previous = [(i, (i - 1) % num_devices) for i in range(num_devices)]

    def send(tree):
        if num_devices == 1:
            return tree
        return jax.tree.map(lambda x: lax.ppermute(x, axes, to_previous), tree)

    def step(carry, is_own: bool):
        columns, of_rows, of_columns = carry
        # Both go out before the work, which need not wait: what arrives is what was gathered for
        # the texts that arrived a step ago, the very ones at hand. (At first all are alike.)
        next_columns = send(columns)
        of_columns = of_columns if is_own else send(of_columns)
        gathered = _block(tile, rows, columns, of_rows, of_columns, is_own, per_image, size)
        return next_columns, *gathered

    carry = step((columns, *gathered), is_own=True)  # no other device's texts are captions here
    if num_devices <= MAX_UNROLLED:
        for _ in range(1, num_devices):
            carry = step(carry, is_own=False)
    else:
        carry = lax.fori_loop(1, num_devices, lambda _, carry: step(carry, is_own=False), carry)
    _, of_rows, of_columns = carry
    return of_rows, send(of_columns)


def _block(tile: Tile, rows, columns, of_rows, of_columns, is_own: bool, per_image: int, size: int):
    """All tiles of a device's images by one block of texts; `is_own`: by the device's own texts."""
    B, T = len(rows[0]), len(columns[0])
    R, C = min(size, B), min(size, T)
    num_across = -(-T // C)

    def one_tile(i, carry):
        of_rows, of_columns = carry
        row, column = i // num_across * R, i % num_across * C
        # The last tile is as large as the others: it starts earlier, over pairs seen before.
        first_row, first_column = jnp.minimum(row, B - R), jnp.minimum(column, T - C)
        row_R1 = first_row + jnp.arange(R)[:, None]
        column_1C = first_column + jnp.arange(C)[None, :]
        is_positive_RC = row_R1 == column_1C // per_image if is_own else None
        is_new_RC = None
        if B % R or T % C:
            is_new_RC = (row_R1 >= row) & (column_1C >= column)
            is_positive_RC = is_positive_RC & is_new_RC if is_own else None
        new_R, new_C = tile(
            _cut(rows, first_row, R),
            _cut(columns, first_column, C),
            Pairs(is_positive_RC, is_new_RC),
            _cut(of_rows, first_row, R),
            _cut(of_columns, first_column, C),
        )
        return _paste(of_rows, new_R, first_row), _paste(of_columns, new_C, first_column)

    num_tiles = -(-B // R) * num_across
    return lax.fori_loop(0, num_tiles, one_tile, (of_rows, of_columns))


def _begin(starts: tuple[Start, ...], length: int, axes: tuple[str, ...]) -> tuple[Array, ...]:
    """The arrays, typed as free to differ between devices (inside shard_map)."""
    arrays = tuple(jnp.full((length, *start.shape), start.value) for start in starts)
    return lax.pcast(arrays, axes, to="varying") if axes else arrays


def _cut(tree, start, size: int):
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), tree)


def _paste(tree, parts, start):
    return jax.tree.map(
        lambda x, part: lax.dynamic_update_slice_in_dim(x, part, start, 0), tree, parts
    )
