"""Images: encoded bytes to uint8 RGB, resizing, and the random changes of training.

Every image is a uint8 array [H, W, 3], 0-255 sRGB; embedded colour profiles are ignored. Random
functions take a `numpy.random.Generator` and draw the same number of values whatever the image.
"""

import dataclasses
import functools
import io
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from capjax.errors import UserError

MAX_PIXELS = 1 << 26  # 67 megapixels: more than a camera's picture, less than Pillow's own alarm
WHITE = 255
_WANTED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO", "PPM")
_EXIF_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Resample = Literal["bilinear", "bicubic"]
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class ImageError(Exception):
    """An image that cannot be used: a short `reason` to count by, and the decoder's `detail`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@functools.cache
def _formats() -> tuple[str, ...]:
    """The wanted formats that this Pillow reads. No others: EPS, for one, runs a program."""
    Image.init()
    return tuple(name for name in _WANTED_FORMATS if name in Image.OPEN)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Encoded bytes -> uint8 [H, W, 3].

    The first frame of an animation, turned as its EXIF says, alpha composited on white; CMYK,
    grey, palette and 16-bit images become 8-bit RGB. More than `max_pixels` are refused from the
    header, before anything is decoded. Raises `ImageError`, and nothing else, on bad bytes.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > max_pixels:
                raise ImageError("too many pixels", f"{image.width}x{image.height}")
            image.load()
            return to_rgb(image)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too many pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image", f"{len(data)} bytes of no known format") from error
    except Exception as error:  # decoders raise a dozen kinds on damaged input
        reason = "truncated image" if "truncated" in str(error).lower() else "damaged image"
        raise ImageError(reason, f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image -> uint8 [H, W, 3], as `decode_image` says. Raises `ImageError`."""
    transpose = _TRANSPOSES.get(_orientation(image))
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
    if transpose is not None:
        image = image.transpose(transpose)
    if 0 in image.size:
        raise ImageError("empty image", f"{image.width}x{image.height}")
    return np.asarray(image)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block does not spoil the pixels
        return 1


def resize(
    image: np.ndarray,
    size: int | tuple[int, int],
    antialias: bool = True,
    resample: Resample = "bilinear",
) -> np.ndarray:
    """[H, W, 3] -> [size, size, 3], or `size` = (height, width).

    With `antialias` the filter widens as the image shrinks (Pillow: its pixels exactly). Without,
    which is bilinear only, it always spans two pixels a side: the pixels that big_vision's models
    were trained on, whose `resize` is TensorFlow's, cut to whole numbers and not rounded.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if image.shape[:2] == (height, width):
        return image
    box = (0, 0, image.shape[1], image.shape[0])
    return _resize_box(image, box, (height, width), antialias, resample)


def _resize_box(
    image: np.ndarray,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    antialias: bool,
    resample: Resample,
) -> np.ndarray:
    """Crops `box` = (left, top, right, bottom) and resizes it to `size` = (height, width)."""
    if antialias:
        return np.asarray(Image.fromarray(image).resize(size[::-1], _FILTERS[resample], box=box))
    x = image[box[1] : box[3], box[0] : box[2]].astype(np.float32)
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


def random_resized_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    antialias: bool = True,
    resample: Resample = "bilinear",
) -> np.ndarray:
    """A random box of the image, resized to [size, size, 3].

    Its share of the area is uniform in `scale` and its width / height log-uniform in `ratio`; a
    side longer than the image's is cut to it (no rejection: always four draws).
    """
    height, width = image.shape[:2]
    u = rng.random(4)
    area = height * width * (scale[0] + u[0] * (scale[1] - scale[0]))
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** u[1]
    box_width = min(max(round((area * aspect) ** 0.5), 1), width)
    box_height = min(max(round((area / aspect) ** 0.5), 1), height)
    left = int(u[2] * (width - box_width + 1))
    top = int(u[3] * (height - box_height + 1))
    box = (left, top, left + box_width, top + box_height)
    return _resize_box(image, box, (size, size), antialias, resample)


def random_shift(
    image: np.ndarray,
    pixels: int,
    rng: np.random.Generator,
    fill: Literal["edge", "white"] = "white",
) -> np.ndarray:
    """Shifts by up to `pixels` along each axis; `fill` comes into view (the edge is repeated)."""
    height, width = image.shape[:2]
    down, right = rng.integers(-pixels, pixels + 1, size=2).tolist()
    rows, columns = np.arange(height) - down, np.arange(width) - right
    if fill == "edge":
        return image[np.clip(rows, 0, height - 1)][:, np.clip(columns, 0, width - 1)]
    down, right = (
        max(-height, min(down, height)),
        max(-width, min(right, width)),
    )
    out = np.full_like(image, WHITE)
    out[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
        max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return out


def flip(image: np.ndarray) -> np.ndarray:
    """Left and right exchanged."""
    return image[:, ::-1]


def color_jitter(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and saturation each scaled by a factor uniform in 1 ± `strength`."""
    brightness, contrast, saturation = (1 + strength * (2 * rng.random(3) - 1)).tolist()
    x = image.astype(np.float32)
    grey = x @ np.array([0.299, 0.587, 0.114], np.float32)
    # One affine map: away from grey by `saturation`, from the mean by `contrast`, then brighter.
    x = x * saturation + (grey * (1 - saturation))[..., None]
    x = (x * contrast + float(grey.mean()) * (1 - contrast)) * brightness
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class ImagePreprocessing:
    """How an image becomes the model's input; stored in checkpoints (`dataclasses.asdict`).

    `mode`: "stretch" both sides to `image_size`; "pad" the shorter side with white; "crop" the
    longer one: the image is resized until its shorter side is `image_size`, the longer one by the
    same factor and cut to whole pixels, then its centre is taken, the lesser half of an odd rest
    being left of it or above. These are the pixels of transformers' processors on Pillow.
    (torchvision's `CenterCrop` rounds half a pixel to even: one pixel beside it for some sizes.)

    `resize_to`: the square's side before the rows below and the columns right of `image_size` are
    dropped; 0: `image_size`. Patches of 14 pixels do not fill 384: SigLIP's models of that size
    read 378 of them, which is their `image_size`.
    """

    image_size: int
    antialias: bool = True
    mode: Literal["stretch", "pad", "crop"] = "stretch"
    resample: Resample = "bilinear"
    resize_to: int = 0

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size={self.image_size}: expected at least 1")
        if self.resize_to and self.resize_to < self.image_size:
            raise UserError(
                f"resize_to={self.resize_to}: expected 0, or image_size={self.image_size} or more"
            )
        if self.mode not in ("stretch", "pad", "crop"):
            raise UserError(f"mode={self.mode!r}: expected 'stretch', 'pad' or 'crop'")
        if self.resample not in _FILTERS:
            raise UserError(f"resample={self.resample!r}: expected 'bilinear' or 'bicubic'")
        if self.resample != "bilinear" and not self.antialias:
            raise UserError(f"resample={self.resample!r}: expected 'bilinear' without antialias")

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [image_size, image_size, 3]."""
        square = self._squared(image, self.resize_to or self.image_size)
        return square[: self.image_size, : self.image_size]

    def _squared(self, image: np.ndarray, size: int) -> np.ndarray:
        height, width = image.shape[:2]
        if self.mode == "stretch" or height == width:
            return self._resize(image, (size, size))
        side = min(height, width) if self.mode == "crop" else max(height, width)
        if self.mode == "crop":
            resized = self._resize(image, (size * height // side, size * width // side))
            top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
            return resized[top : top + size, left : left + size]
        inner = (max(round(size * height / side), 1), max(round(size * width / side), 1))
        top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
        out = np.full((size, size, 3), WHITE, np.uint8)
        out[top : top + inner[0], left : left + inner[1]] = self._resize(image, inner)
        return out

    def _resize(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return resize(image, size, self.antialias, self.resample)

    def preprocess_bytes(self, data: bytes) -> np.ndarray:
        """Encoded bytes -> uint8 [image_size, image_size, 3]. Raises `ImageError`."""
        return self.preprocess(decode_image(data))
