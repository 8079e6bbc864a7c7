"""The walk over all pairs: each once, whatever the tiles, the mesh and the form of the ring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from capjax.mesh import BATCH, MeshShape, make_mesh
from capjax.objectives import tiles
from capjax.objectives.tiles import Start, per_device, walk


def sums_of_pairs(size, per_image, axes, row_B, column_BK):
    """For each image and each text: the sum over its pairs of row * column, and over positives."""

    def tile(rows, columns, pairs, of_rows, of_columns):
        product_RC = rows[0][:, None] * columns[0][None, :]
        if pairs.is_new_RC is not None:
            product_RC = jnp.where(pairs.is_new_RC, product_RC, 0)
        own_RC = jnp.zeros_like(product_RC)
        if pairs.is_positive_RC is not None:
            own_RC = jnp.where(pairs.is_positive_RC, product_RC, 0)
        parts = product_RC, own_RC
        return (
            tuple(x + part.sum(1) for x, part in zip(of_rows, parts, strict=True)),
            tuple(x + part.sum(0) for x, part in zip(of_columns, parts, strict=True)),
        )

    starts = Start(1.0), Start(0.0)
    of_rows, of_columns = walk(
        tile,
        (row_B,),
        (column_BK.reshape(-1),),
        starts,
        starts,
        per_image=per_image,
        size=size,
        axes=axes,
    )
    return (*of_rows, *(x.reshape(column_BK.shape) for x in of_columns))


@pytest.mark.parametrize("max_unrolled", [1, 16])
@pytest.mark.parametrize(
    ("shape", "size"), [(None, 5), ((1, 8, 1, 1), 2), ((2, 2, 2, 1), 16), ((1, 2, 2, 2), 4)]
)
def test_every_pair_is_seen_once(shape, size, max_unrolled, monkeypatch):
    monkeypatch.setattr(tiles, "MAX_UNROLLED", max_unrolled)
    rng = np.random.default_rng(0)
    row_B, column_BK = rng.integers(-9, 9, 24) / 4, rng.integers(-9, 9, (24, 3)) / 4
    row_B, column_BK = jnp.asarray(row_B, jnp.float32), jnp.asarray(column_BK, jnp.float32)
    function = functools.partial(sums_of_pairs, size, 3)
    step = jax.jit(lambda row_B, column_BK: per_device(function, (row_B, column_BK), ()))
    if shape is None:
        found = step(row_B, column_BK)
    else:
        with jax.set_mesh(make_mesh(MeshShape(*shape))):
            placed = jax.device_put((row_B, column_BK), (P(BATCH), P(BATCH, None)))
            found = jax.device_get(step(*placed))
    own_BK = row_B[:, None] * column_BK
    np.testing.assert_array_equal(found[0], 1 + row_B * column_BK.sum())
    np.testing.assert_array_equal(found[1], own_BK.sum(1))
    np.testing.assert_array_equal(found[2], 1 + column_BK * row_B.sum())
    np.testing.assert_array_equal(found[3], own_BK)
