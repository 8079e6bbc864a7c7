"""The fast decoder and resizer give Pillow's pixels, in threads too; how near is bounded here."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from capjax.data import decode
from capjax.data import resize as resizing
from capjax.data.augmentation import Augment, augment_image
from capjax.data.images import ImagePreprocessing
from capjax.data.stream import position_rng


def photo(height: int, width: int, seed: int) -> np.ndarray:
    """Waves, an edge and noise, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((height, width))[..., None]
    pixels = 128 + 70 * np.sin(rows / rng.uniform(2, 20)) * np.cos(columns / 7 + np.arange(3))
    pixels = np.where(rows * 2 > columns, pixels, 255 - pixels) + rng.normal(0, 8, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=93)
    return buffer.getvalue()


def weights(old: int, new: int) -> np.ndarray:
    """[new, old] float64: triangles of half-width max(old / new, 1) pixels, each of sum 1."""
    distance = (np.arange(new) + 0.5)[:, None] * old / new - (np.arange(old) + 0.5)
    found = np.maximum(0, 1 - np.abs(distance) / max(old / new, 1))
    return found / found.sum(1, keepdims=True)


@pytest.fixture(params=["fast", "pillow"])
def path(request, monkeypatch):
    if request.param == "fast":
        if resizing._cykooz is None and decode._simplejpeg is None:
            pytest.skip("neither simplejpeg nor cykooz-resizer is installed")
    else:
        monkeypatch.setattr(resizing, "_cykooz", None)
        monkeypatch.setattr(decode, "_simplejpeg", None)
    return request.param


def test_the_error_of_decoding_and_resizing_is_bounded(path):
    """32 JPEGs against a float64 resize of Pillow's pixels: 1 grey level at most, 0.4 on average.

    (The bounds asked for are 2.5 and 1.0. Whole numbers alone err by 0.5 and 0.25.)
    """
    shapes = [(375, 500), (96, 131), (64, 40), (50, 300), (57, 56), (30, 41), (113, 57), (20, 20)]
    for seed in range(32):
        data = jpeg(photo(*shapes[seed % 8], seed))
        exact = np.asarray(Image.open(io.BytesIO(data))).astype(np.float64)
        height, width = exact.shape[:2]
        rows = np.tensordot(weights(height, 56), exact, 1)
        wanted = np.einsum("xw,ywc->yxc", weights(width, 56), rows, optimize=True)
        errors = np.abs(ImagePreprocessing(56).preprocess_bytes(data) - wanted)
        assert errors.max() < 1.1, shapes[seed % 8]
        assert errors.mean() < 0.4, shapes[seed % 8]


@pytest.mark.parametrize("case", range(30))
def test_crops_are_pillows_to_one_grey_level(case, path):
    rng = np.random.default_rng(case)
    height, width = rng.integers(1, 200, 2).tolist()
    left, top = int(rng.integers(width)), int(rng.integers(height))
    box = (left, top, int(rng.integers(left, width)) + 1, int(rng.integers(top, height)) + 1)
    size = tuple(rng.integers(1, 90, 2).tolist())
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    for pixels in (image, image[:, ::-1]):  # an array with a stride of its own too
        wanted = np.asarray(
            Image.fromarray(np.ascontiguousarray(pixels)).resize(
                size[::-1], Image.Resampling.BILINEAR, box=box
            )
        )
        found = resizing.resize_box(pixels, box, size, True, "bilinear")
        assert found.shape == wanted.shape
        assert np.abs(found.astype(int) - wanted).max() <= (1 if path == "fast" else 0)


def test_other_filters_are_not_the_fast_ones(path):
    image = photo(70, 90, 0)
    wanted = Image.fromarray(image).resize((31, 29), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resizing.resize(image, (29, 31), resample="bicubic"), wanted)


def test_exact_pixels_are_pillows(path):
    image = photo(70, 90, 0)
    wanted = Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)
    preprocessing = ImagePreprocessing(32, exact=True)
    np.testing.assert_array_equal(preprocessing.preprocess(image), wanted)
    augment = Augment(crop_scale=(0.3, 0.6))
    cropped = [
        augment_image(image, "", ImagePreprocessing(32, exact=exact), augment, position_rng(0, 0))
        for exact in (True, False)
    ]
    assert np.abs(cropped[0].astype(int) - cropped[1]).max() <= 1
    assert (cropped[0] == cropped[1]).all() == (resizing._cykooz is None)


def test_packages_that_make_other_pixels_are_told(monkeypatch):
    monkeypatch.setattr(decode, "_simplejpeg", None)
    monkeypatch.setattr(resizing, "_cykooz", None)
    slow = ImagePreprocessing(8).made_by()
    assert slow == {"decoder": "pillow", "resizer": "pillow"}
    assert ImagePreprocessing(8).other_pixels(slow) == ImagePreprocessing(8).other_pixels({}) == ""
    monkeypatch.setattr(resizing, "_cykooz", object())
    for fields, by in (
        ({}, "cykooz-resizer"),
        ({"exact": True}, "pillow"),
        ({"resample": "bicubic"}, "pillow"),
        ({"antialias": False}, "capjax"),
    ):
        assert ImagePreprocessing(8, **fields).made_by()["resizer"] == by
    assert ImagePreprocessing(8).other_pixels(slow) == (
        "in training the resizer was pillow and is cykooz-resizer here: pixels may differ by a "
        "grey level of 255; pip uninstall cykooz-resizer for the same"
    )
    fast = {"decoder": "simplejpeg", "resizer": "cykooz-resizer"}
    assert ImagePreprocessing(8).other_pixels(fast) == (
        "in training the decoder was simplejpeg and is pillow here: pixels may differ by a grey "
        "level of 255; pip install simplejpeg for the same"
    )


def test_threads_do_not_disturb_one_another(path):
    files = [jpeg(photo(60 + seed, 90 - seed, seed)) for seed in range(40)]
    preprocessing = ImagePreprocessing(32)
    alone = [preprocessing.preprocess_bytes(data) for data in files]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(
            pool.map(preprocessing.preprocess_bytes, files), alone, strict=True
        ):
            np.testing.assert_array_equal(found, wanted)
