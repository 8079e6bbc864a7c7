"""Resizing uint8 RGB images: with antialiasing as Pillow does, without as TensorFlow does."""

import threading
from typing import Any, Literal

import numpy as np
from PIL import Image

from capjax.data.decode import optional_module

Resample = Literal["bilinear", "bicubic"]
Box = tuple[int, int, int, int]  # left, top, right, bottom
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_cykooz = optional_module("cykooz_resizer")
_of_thread = threading.local()  # a resizer serves one call at a time


def resizer(antialias: bool, resample: Resample, exact: bool) -> str:
    """What resizes here: "capjax" without antialias, else "cykooz-resizer" or "pillow"."""
    if not antialias:
        return "capjax"
    is_fast = _cykooz is not None and resample == "bilinear" and not exact
    return "cykooz-resizer" if is_fast else "pillow"


def resize(
    image: np.ndarray,
    size: int | tuple[int, int],
    antialias: bool = True,
    resample: Resample = "bilinear",
    exact: bool = False,
) -> np.ndarray:
    """[H, W, 3] -> [size, size, 3], or `size` = (height, width).

    With `antialias` the filter widens as the image shrinks: Pillow's pixels exactly; where
    cykooz-resizer is installed, bilinear ones differ from them by 1 at most and take a fifth of
    the time, unless they are to be `exact`. Without, which is bilinear only, the filter always
    spans two pixels a side: the pixels that big_vision's models were trained on, whose `resize` is
    TensorFlow's, cut to whole numbers and not rounded.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if image.shape[:2] == (height, width):
        return image
    box = (0, 0, image.shape[1], image.shape[0])
    return resize_box(image, box, (height, width), antialias, resample, exact)


def resize_box(
    image: np.ndarray,
    box: Box,
    size: tuple[int, int],
    antialias: bool,
    resample: Resample,
    exact: bool = False,
) -> np.ndarray:
    """Crops `box` = (left, top, right, bottom) and resizes it to `size` = (height, width)."""
    by = resizer(antialias, resample, exact)
    if by == "capjax":
        return _aliased(image[box[1] : box[3], box[0] : box[2]], size)
    if by == "cykooz-resizer":
        return _bilinear(image, box, size)
    return np.asarray(Image.fromarray(image).resize(size[::-1], FILTERS[resample], box=box))


def _bilinear(image: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Pillow's antialiased bilinear filter in vector instructions. Leaves the interpreter lock."""
    if not hasattr(_of_thread, "resizer"):
        _of_thread.resizer = _cykooz.Resizer()
    options: Any = _cykooz.ResizeOptions(
        _cykooz.ResizeAlg.convolution(_cykooz.FilterType.bilinear),
        use_alpha=False,
        crop_box=_cykooz.CropBox(box[0], box[1], box[2] - box[0], box[3] - box[1]),
    )
    kind = _cykooz.PixelType.U8x3
    source = _cykooz.ImageData(image.shape[1], image.shape[0], kind, image.tobytes())
    target = _cykooz.ImageData(size[1], size[0], kind)
    _of_thread.resizer.resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(*size, 3)


def _aliased(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    x = image.astype(np.float32)
    # Columns before rows, all in float32, each sum as TensorFlow writes it: another rounding would
    # fall below a whole number where theirs does not.
    for axis in (1, 0):
        old, new = x.shape[axis], size[axis]
        scale = np.float32(old) / np.float32(new)
        centre = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
        low = np.floor(centre)
        part = np.expand_dims(centre - low, (2, 1 - axis))
        first = np.take(x, np.maximum(low, 0).astype(np.int64), axis)
        second = np.take(x, np.minimum(low + 1, old - 1).astype(np.int64), axis)
        x = first + (second - first) * part
    return x.astype(np.uint8)
