"""Position embeddings for other sizes."""

import numpy as np
import pytest
import scipy.ndimage

from capjax.errors import UserError
from capjax.models.resize import resize_position_embedding, resize_text_positions


def ramp(grid):
    """Row and column of each patch, from 0 at one side to 1 at the other."""
    rows, columns = np.meshgrid(*[np.linspace(0, 1, grid)] * 2, indexing="ij")
    return np.stack([rows.ravel(), columns.ravel()], 1).astype(np.float32)


@pytest.mark.parametrize(("old", "new"), [(3, 7), (7, 3), (2, 5), (14, 16)])
def test_a_linear_ramp_stays_one(old, new):
    resized = resize_position_embedding(ramp(old), old, new)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, ramp(new), atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(3, 7), (7, 4), (14, 16), (1, 2), (4, 1)])
def test_as_scipy_zooms(old, new):
    posemb_PD = np.random.default_rng(0).standard_normal((old**2, 5)).astype(np.float32)
    grid_HWD = posemb_PD.reshape(old, old, 5)
    want = scipy.ndimage.zoom(grid_HWD, (new / old, new / old, 1), order=1)
    found = resize_position_embedding(posemb_PD, old, new)
    np.testing.assert_allclose(found, want.reshape(new**2, 5), atol=1e-6)


def test_a_constant_stays_one():
    np.testing.assert_allclose(
        resize_position_embedding(np.full((9, 2), 3.5, np.float32), 3, 8), 3.5, rtol=1e-6
    )


def test_the_same_grid_is_left_alone():
    posemb_PD = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    assert resize_position_embedding(posemb_PD, 3, 3) is posemb_PD


def test_another_number_of_patches_is_refused():
    with pytest.raises(UserError, match="8 position embeddings: expected 3 x 3"):
        resize_position_embedding(np.zeros((8, 4), np.float32), 3, 4)


def test_text_positions():
    posemb_LD = np.arange(8, dtype=np.float32).reshape(4, 2)
    assert resize_text_positions(posemb_LD, 4) is posemb_LD
    np.testing.assert_array_equal(resize_text_positions(posemb_LD, 3, "keep"), posemb_LD[:3])
    longer = resize_text_positions(posemb_LD, 6, "keep")
    np.testing.assert_array_equal(longer, posemb_LD[[0, 1, 2, 3, 3, 3]])
    with pytest.raises(UserError, match="text_length=6, but the weights have 4 positions: use 4"):
        resize_text_positions(posemb_LD, 6)
    with pytest.raises(UserError, match="policy='cut': choose 'error' or 'keep'"):
        resize_text_positions(posemb_LD, 6, "cut")
