"""One example on its way into prepared shards: its captions cleaned, its image checked and shrunk.

Pure functions of the example and the settings: nothing here knows of parts, shards or workers.
"""

import dataclasses
import hashlib
import io
import unicodedata
from typing import NamedTuple

import numpy as np
from PIL import Image

from capjax.data.decode import ImageError, decode_image
from capjax.data.records import Caption, Example
from capjax.data.resize import resize
from capjax.errors import UserError

FORMATS = ("keep", "jpeg", "webp")
DEDUPES = ("key", "content")
HASH_BYTES = 16
# What counts towards `max_bad`: the data is damaged there. The other reasons are the user's wishes.
UNREADABLE = "unreadable record"
WISHED = ("too small", "no caption", "duplicate key", "duplicate content")
_KEPT_FORMATS = {"JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WEBP"}
_WEBP_METHOD = 4
_BYTE_ORDER_MARK = "\ufeff"


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """What decides the bytes of prepared shards.

    `split`: the shards' first name; `shard_size`: examples in each; `resize`: the shorter side of
    larger images becomes so many pixels; `max_pixels`: larger images shrink to so many (0: neither
    is done; nothing is ever enlarged); `format`, of `FORMATS`, and `quality`: see `prepare_image`;
    `min_size`: the least shorter side, in pixels, of an image that stays; `max_caption_length`:
    characters of the longest caption that stays (0: any); `dedupe`: some of `DEDUPES`.
    """

    split: str = "train"
    shard_size: int = 10_000
    resize: int = 0
    max_pixels: int = 0
    format: str = "keep"
    quality: int = 90
    min_size: int = 1
    max_caption_length: int = 0
    dedupe: tuple[str, ...] = ("key",)

    def __post_init__(self) -> None:
        if not self.split or self.split.startswith(".") or set(self.split) & set("/\\*?[]"):
            raise UserError(f"split={self.split!r}: expected a part of a file name, as in 'train'")
        least = {"shard_size": 1, "resize": 0, "max_pixels": 0, "quality": 1, "min_size": 1}
        for field, bound in (least | {"max_caption_length": 0}).items():
            if getattr(self, field) < bound:
                raise UserError(f"{field}={getattr(self, field)}: expected at least {bound}")
        if self.quality > 100:
            raise UserError(f"quality={self.quality}: expected 1 to 100")
        if self.resize and self.max_pixels:
            raise UserError(
                f"resize={self.resize} and max_pixels={self.max_pixels}: give one of them"
            )
        if self.format not in FORMATS:
            raise UserError(f"format={self.format!r}: expected one of {', '.join(FORMATS)}")
        if not set(self.dedupe) <= set(DEDUPES):
            raise UserError(
                f"dedupe={','.join(self.dedupe)}: expected some of {', '.join(DEDUPES)}, or none"
            )


class Dropped(NamedTuple):
    """An example that is left out: its key where it has one, a reason to count by, a detail."""

    key: str
    reason: str
    detail: str


class Kept(NamedTuple):
    """An example as it is written, and the hash of its image as the source has it."""

    example: Example
    content: bytes
    num_captions_dropped: int


def prepare_example(example: Example, settings: PrepareSettings) -> Kept | Dropped:
    """Cleans, checks and shrinks one example."""
    captions = clean_captions(example.captions, settings.max_caption_length)
    if not captions:
        had = f"{len(example.captions)} captions, all empty or too long"
        return Dropped(example.key, "no caption", had if example.captions else "it has none")
    try:
        pixels = decode_image(example.image)
        height, width = pixels.shape[:2]
        if min(height, width) < settings.min_size:
            return Dropped(example.key, "too small", f"{width}x{height} pixels")
        image = prepare_image(example.image, pixels, settings)
    except ImageError as error:
        return Dropped(example.key, error.reason, error.detail)
    boxes = example.boxes
    new_height, new_width = target_size(height, width, settings)
    if boxes is not None and (new_height, new_width) != (height, width):
        x, y = new_width / width, new_height / height
        boxes = tuple((box[0] * x, box[1] * y, box[2] * x, box[3] * y) for box in boxes)
    content = content_hash(example.image)
    example, before = example._replace(image=image, captions=captions, boxes=boxes), example
    return Kept(example, content, len(before.captions) - len(captions))


def content_hash(data: bytes) -> bytes:
    """The hash by which two images, or two keys, are the same: BLAKE2b, 16 bytes."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def target_size(height: int, width: int, settings: PrepareSettings) -> tuple[int, int]:
    """Height and width that an image gets; never more than it has."""
    scale = 1.0
    if settings.resize:
        scale = min(1.0, settings.resize / min(height, width))
    elif settings.max_pixels:
        scale = min(1.0, (settings.max_pixels / (height * width)) ** 0.5)
    if scale == 1.0:
        return height, width
    if settings.resize:  # the shorter side is exact
        return max(round(height * scale), 1), max(round(width * scale), 1)
    return max(int(height * scale), 1), max(int(width * scale), 1)


def prepare_image(data: bytes, pixels: np.ndarray, settings: PrepareSettings) -> bytes:
    """The bytes to store of an image and its `pixels` uint8 [H, W, 3].

    An image that needs no shrinking and has the wanted format stays byte for byte. Others are
    written anew, as RGB turned upright and on white: in the wanted format, or for "keep" as JPEG
    or WebP where they were that, else as PNG.
    """
    height, width = pixels.shape[:2]
    size = target_size(height, width, settings)
    with Image.open(io.BytesIO(data)) as image:  # the header: it was decoded before
        before = _KEPT_FORMATS.get(image.format or "", "PNG")
    wanted = before if settings.format == "keep" else settings.format.upper()
    if size == (height, width) and wanted == before:
        return data
    out = Image.fromarray(np.ascontiguousarray(resize(pixels, size, resample="bicubic")))
    buffer = io.BytesIO()
    if wanted == "PNG":
        out.save(buffer, "PNG")
    elif wanted == "WEBP":
        out.save(buffer, "WEBP", quality=settings.quality, method=_WEBP_METHOD)
    else:
        out.save(buffer, "JPEG", quality=settings.quality)
    return buffer.getvalue()


def clean_captions(captions: tuple[Caption, ...], max_length: int) -> tuple[Caption, ...]:
    """The captions with their texts cleaned, without the empty ones and those too long."""
    cleaned = (caption._replace(text=clean_caption(caption.text)) for caption in captions)
    return tuple(
        caption
        for caption in cleaned
        if caption.text and (not max_length or len(caption.text) <= max_length)
    )


def clean_caption(text: str) -> str:
    """A caption in Unicode's form NFC, in one line, without what no text should hold.

    Surrogate pairs become the character they stand for, single ones U+FFFD; control characters
    become spaces; byte order marks go; runs of white space become one space, with none around.
    """
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    text = text.replace(_BYTE_ORDER_MARK, "")
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join(unicodedata.normalize("NFC", text).split())
