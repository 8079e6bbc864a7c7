"""Encoded bytes to uint8 RGB [H, W, 3], 0-255 sRGB: every file gives pixels or an `ImageError`.

| the file | the outcome |
|---|---|
| JPEG (also grey, progressive, CMYK and YCCK as Adobe inverts them), PNG, WebP, GIF | its pixels |
| BMP, TIFF, PPM; AVIF where Pillow reads it; any of them under a wrong name | its pixels |
| palette, 1 or 16 bits, alpha | 8-bit RGB: the high byte of 16 bits, alpha on white |
| several frames: GIF, WebP, APNG, MPO | the first (APNG: its default image) |
| EXIF orientation | applied; a broken EXIF block is passed over |
| 1 x 1, 1 x 20000 | its pixels |
| more than `max_pixels` in its header | "too many pixels", before anything is allocated |
| a progressive JPEG whose scans together cover 2^31 pixels | "too many pixels", likewise |
| bytes are missing, or a JPEG's data end before its end marker | "truncated image" |
| broken streams, headers and checksums, headers cut short | "damaged image" |
| HEIC, JPEG XL, JPEG 2000, SVG, PDF; AVIF where Pillow does not read it | "unsupported format" |
| no bytes, text, HTML, PostScript, anything else | "not an image" |
| a TIFF of floating-point numbers; no width or height | "floating-point image"; "empty image" |

simplejpeg, where it is installed, decodes RGB and grey JPEGs: the same pixels as Pillow's in three
quarters of the time, and it tells of data that ends early. What it refuses goes to Pillow, which
accepts stray bytes, as many files have. Without it, a JPEG that was cut and given an end marker
comes out partly grey.
"""

import functools
import importlib
import io
import threading
import warnings
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 1 << 26  # 67 megapixels: more than a camera's picture, less than Pillow's own alarm
WHITE = 255
_MAX_SCANS = 32  # at MAX_PIXELS; encoders write about 10, and a hostile file thousands
_WANTED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO", "PPM")
_EXIF_ORIENTATION = 0x0112
_BOX_BRANDS = {  # ISO base media files: the brand behind "ftyp"
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"hevc": "HEIC",
    b"mif1": "HEIC",
    b"msf1": "HEIC",
    b"avif": "AVIF",
    b"avis": "AVIF",
}
_PREFIXES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"%PDF": "PDF",
}

# Remarks on metadata, on files that are read all the same: they tell a training run nothing.
warnings.filterwarnings("ignore", module=r"PIL\.")
_warnings_lock = threading.Lock()


class ImageError(Exception):
    """An image that cannot be used: a short `reason` to count by, and the decoder's `detail`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def optional_module(name: str) -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_simplejpeg = optional_module("simplejpeg")


def decoder() -> str:
    """What decodes JPEGs here: "simplejpeg" or "pillow"."""
    return "pillow" if _simplejpeg is None else "simplejpeg"


@functools.cache
def _formats() -> tuple[str, ...]:
    """The wanted formats that this Pillow reads. No others: EPS, for one, runs a program."""
    Image.init()
    return tuple(name for name in _WANTED_FORMATS if name in Image.OPEN)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Encoded bytes -> uint8 [H, W, 3], as the module's table says.

    Raises `ImageError`, and nothing else, on bad bytes.
    """
    try:
        try:
            return _decoded(data, max_pixels)
        except Warning:  # Pillow's remark under `-W error`, which must not change what is read
            with _warnings_lock, warnings.catch_warnings(action="ignore"):
                return _decoded(data, max_pixels)
    except ImageError:
        raise
    except Exception as error:
        raise _failure(data, error) from error


def _decoded(data: bytes, max_pixels: int) -> np.ndarray:
    _check_pixels(_declared_size(data), 1, max_pixels)
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        scans = data.count(b"\xff\xda") if "progressive" in image.info else 1
        _check_pixels(image.size, scans, max_pixels)
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            pixels = _jpeg_pixels(data)
            if pixels is not None:
                return _upright(pixels, _orientation(image))
        image.load()
        return to_rgb(image)


def _check_pixels(size: tuple[int, int], scans: int, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError("too many pixels", f"{width}x{height}")
    if width * height * scans > _MAX_SCANS * MAX_PIXELS:
        raise ImageError("too many pixels", f"{width}x{height} in {scans} scans")


def _declared_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a GIF or WebP, whose canvas Pillow allocates as it opens; else (0, 0)."""

    def number(start: int, length: int) -> int:
        return int.from_bytes(data[start : start + length], "little")

    if data[:4] == b"GIF8":
        return number(6, 2), number(8, 2)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = data[12:16]
        if kind == b"VP8X":
            return number(24, 3) + 1, number(27, 3) + 1
        if kind == b"VP8L":
            bits = number(21, 4)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if kind == b"VP8 ":
            return number(26, 2) & 0x3FFF, number(28, 2) & 0x3FFF
    return 0, 0


def _jpeg_pixels(data: bytes) -> np.ndarray | None:
    """A JPEG's pixels as stored, or None: for Pillow to decode or to refuse."""
    if _simplejpeg is None:
        return None
    try:
        return _simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise ImageError("truncated image", str(error)) from error
        return None


def _failure(data: bytes, error: Exception) -> ImageError:
    """Why a decoder gave up; decoders raise a dozen kinds on damaged input."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, Image.DecompressionBombError):
        return ImageError("too many pixels", str(error))
    if data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        return ImageError("truncated image", text)  # libwebp says no more than that it failed
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(data)
    truncated = "truncated" in text.lower()
    return ImageError("truncated image" if truncated else "damaged image", text)


def _unidentified(data: bytes) -> ImageError:
    """Why Pillow does not know a file, from its first bytes."""
    name = _BOX_BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else None
    for prefix, kind in _PREFIXES.items():
        if data.startswith(prefix):
            name = kind
    head = data[:1024].lstrip()
    if head.startswith(b"<svg") or (head.startswith(b"<?xml") and b"<svg" in head):
        name = "SVG"
    if name in _formats():
        return ImageError("damaged image", f"{len(data)} bytes of a {name} without a whole header")
    if name:
        return ImageError("unsupported format", f"{name}; convert it to JPEG, PNG or WebP")
    return ImageError("not an image", f"{len(data)} bytes of no known format")


def to_rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image -> uint8 [H, W, 3], as `decode_image` says. Raises `ImageError`."""
    orientation = _orientation(image)
    if image.mode == "F":
        raise ImageError("floating-point image", "the range of its values is not known")
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip at 255
        high = np.clip(np.asarray(image), 0, 65535) >> 8
        image = Image.fromarray(high.astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, (WHITE, WHITE, WHITE))
        background.paste(image, mask=image.getchannel("A"))
        image = background
    if image.mode != "RGB":
        image = image.convert("RGB")
    if 0 in image.size:
        raise ImageError("empty image", f"{image.width}x{image.height}")
    return _upright(np.asarray(image), orientation)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block does not spoil the pixels
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The stored pixels turned and mirrored as EXIF's 1 to 8 ask for."""
    if orientation not in range(2, 9):
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
