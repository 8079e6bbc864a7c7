"""Every image once, in order, whatever the batch and the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.evaluation.every_row import NO_LABEL, map_images, map_rows
from tests.evaluation.tiny import (
    BROKEN,
    EIGHT,
    ONE,
    PREPROCESSING,
    UNLABELLED,
    LabelledImages,
    readable,
)


@jax.jit
def sums(images_BHWC):
    return jnp.sum(images_BHWC.astype(jnp.int32), axis=(1, 2))


@pytest.mark.parametrize("count", [24, 21])
@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one", "eight"])
def test_every_readable_image_once_in_order(count, mesh):
    source = LabelledImages(count)
    rows = map_images(sums, source, PREPROCESSING, mesh=mesh, batch_size=8)
    examples = [source[index] for index in readable(count)]
    assert rows.keys == tuple(example.key for example in examples)
    labels = [NO_LABEL if example.label is None else example.label for example in examples]
    np.testing.assert_array_equal(rows.labels_N, labels)
    assert rows.labels_N[readable(count).index(UNLABELLED)] == NO_LABEL
    assert rows.unreadable == 2
    for value, example in zip(rows.values, examples, strict=True):
        pixels = PREPROCESSING.preprocess_bytes(example.image)
        np.testing.assert_array_equal(value, pixels.sum((0, 1)))


def test_fewer_examples_are_evenly_spread():
    rows = map_images(sums, LabelledImages(24), PREPROCESSING, mesh=ONE, max_examples=4)
    assert rows.keys == tuple(f"a/{index:03d}" for index in (0, 6, 12, 18))


def test_what_cannot_be_measured_is_an_error():
    class Broken(LabelledImages):
        def __getitem__(self, index):
            return super().__getitem__(BROKEN)

    with pytest.raises(UserError, match="none of its 3 images can be read"):
        map_images(sums, Broken(3), PREPROCESSING, mesh=ONE)
    with pytest.raises(UserError, match="max_examples=0"):
        map_images(sums, LabelledImages(3), PREPROCESSING, mesh=ONE, max_examples=0)
    with pytest.raises(UserError, match="batch_size=6 does not divide"):
        map_images(sums, LabelledImages(3), PREPROCESSING, mesh=EIGHT, batch_size=6)


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one", "eight"])
def test_rows_of_an_array(mesh):
    x_ND = np.random.default_rng(0).normal(size=(21, 3)).astype(np.float32)
    twice_ND, sums_N = map_rows(
        lambda rows: (2 * rows["x"], rows["x"].sum(1)), {"x": x_ND}, mesh=mesh, batch_size=8
    )
    np.testing.assert_array_equal(twice_ND, 2 * x_ND)
    np.testing.assert_allclose(sums_N, x_ND.sum(1), rtol=1e-6)
