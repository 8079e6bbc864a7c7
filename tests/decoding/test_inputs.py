"""Reading images of any kind, reading ahead, and padding batches."""

import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from capjax.data.decode import ImageError
from capjax.data.images import ImagePreprocessing
from capjax.decoding import inputs

PREPROCESSING = ImagePreprocessing(image_size=8)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_every_kind_of_the_same_picture_gives_the_same_pixels(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    image = Image.fromarray(array)
    path = tmp_path / "a.png"
    path.write_bytes(png(image))
    expected = PREPROCESSING.preprocess(array)
    for kind in (array, image, path, str(path), png(image)):
        np.testing.assert_array_equal(inputs.to_pixels(kind, PREPROCESSING), expected)


def test_alpha_is_composited_and_grey_repeated_in_arrays_as_in_files():
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    from_file = inputs.to_pixels(png(Image.fromarray(rgba)), PREPROCESSING)
    np.testing.assert_array_equal(inputs.to_pixels(rgba, PREPROCESSING), from_file)
    grey = rgba[..., 0]
    for kind in (grey, grey[..., None]):
        pixels = inputs.to_pixels(kind, PREPROCESSING)
        np.testing.assert_array_equal(pixels, np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "float32 array"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"\(2, 8, 8, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), "empty image"),
        (b"not an image", "not an image"),
        ("/nonexistent/a.png", "unreadable file: /nonexistent/a.png: No such file"),
    ],
)
def test_what_is_no_image_is_named(image, message):
    with pytest.raises(ImageError, match=message):
        inputs.to_pixels(image, PREPROCESSING)


def test_read_ahead_keeps_the_order_and_the_distance():
    started = []

    def read(item):
        started.append(item)
        time.sleep(0.002 * (item % 3))
        return item * item

    results = inputs.read_ahead(read, range(40), ahead=5)
    for expected in range(40):
        assert next(results) == expected**2
        assert len(started) <= expected + 1 + 5
    assert next(results, None) is None


def test_read_ahead_raises_in_turn_and_leaves_no_thread():
    before = threading.active_count()

    def read(item):
        return 1 // (item - 2)

    results = inputs.read_ahead(read, range(10), ahead=4)
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before  # threads of earlier tests may end meanwhile


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "multiple", "expected"),
    [
        (1, 32, 1, 1),
        (3, 32, 1, 4),
        (17, 32, 1, 32),
        (32, 32, 1, 32),
        (18, 20, 1, 20),
        (1, 32, 8, 8),
        (9, 32, 8, 16),
        (5, 4, 8, 8),
    ],
)
def test_compiled_size(num_rows, batch_size, multiple, expected):
    assert inputs.compiled_size(num_rows, batch_size, multiple) == expected


def test_pad_rows():
    rows = np.ones((2, 3), np.uint8)
    padded = inputs.pad_rows(rows, 4)
    assert padded.dtype == np.uint8
    np.testing.assert_array_equal(padded, [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(inputs.pad_rows(rows, 2), rows)
