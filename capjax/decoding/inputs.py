"""Images of any kind to the model's pixels, read ahead in threads, in batches of one size."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from capjax.data.decode import ImageError, decode_image, to_rgb
from capjax.data.images import ImagePreprocessing
from capjax.data.records import CorruptRecord
from capjax.data.sources import Source

ImageLike = np.ndarray | Image.Image | str | os.PathLike | bytes
T = TypeVar("T")
R = TypeVar("R")


def to_pixels(image: ImageLike, preprocessing: ImagePreprocessing) -> np.ndarray:
    """uint8 [size, size, 3] of one image: uint8 array [H, W, 3|4|1] or [H, W], PIL, path or bytes.

    All kinds of the same picture give the same pixels. Raises `ImageError` for what cannot be read.
    """
    if isinstance(image, np.ndarray):
        rgb = _array_to_rgb(image)
    elif isinstance(image, Image.Image):
        rgb = to_rgb(image)
    elif isinstance(image, bytes):
        rgb = decode_image(image)
    else:
        rgb = decode_image(_read_file(image))
    return preprocessing.preprocess(rgb)


def _read_file(path: str | os.PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError("unreadable file", f"{os.fspath(path)}: {error.strerror}") from error


def _array_to_rgb(image: np.ndarray) -> np.ndarray:
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError("not an image", f"{image.dtype} array {image.shape}, not uint8 [H, W, 3]")
    if image.size == 0:
        raise ImageError("empty image", f"array {image.shape}")
    if channels == 3:
        return image
    return to_rgb(Image.fromarray(image if channels == 4 else image.reshape(image.shape[:2])))


def example_reader(source: Source, pixels: Callable[[bytes], np.ndarray | ImageError]) -> Callable:
    """A function from the index of an example to (start of its record, its pixels or the reason).

    The record starts with `key`, and has `references` where the example has captions.
    """

    def read(index: int) -> tuple[dict[str, Any], np.ndarray | ImageError]:
        try:
            example = source[index]
        except CorruptRecord as error:
            keys = getattr(source, "keys", None)  # a directory knows its files, shards do not
            key = keys[index] if keys else f"{Path(error.shard).name}:{error.index}"
            return {"key": key}, ImageError("unreadable record", error.reason)
        about: dict[str, Any] = {"key": example.key}
        if example.captions:
            about["references"] = [caption.text for caption in example.captions]
        return about, pixels(example.image)

    return read


def read_ahead(read: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`map(read, items)` in threads (one a core, up to 16), in order, `ahead` items early at most.

    An exception of `read` is raised at its turn.
    """
    pending = collections.deque()
    executor = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        for item in items:
            pending.append(executor.submit(read, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also where the consumer stops early
        executor.shutdown(wait=False, cancel_futures=True)


def compiled_size(num_rows: int, batch_size: int, multiple: int = 1) -> int:
    """The rows of a batch of `num_rows`: the next power of two, at most `batch_size`.

    It is then a multiple of `multiple` (the batch shards of a mesh). Few sizes, few compilations.
    """
    rows = min(batch_size, 1 << (max(num_rows, 1) - 1).bit_length())
    return -(-rows // multiple) * multiple


def pad_rows(rows: np.ndarray, size: int) -> np.ndarray:
    """[N, ...] -> [size, ...]: what is missing is zeros. The caller drops those rows again."""
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
