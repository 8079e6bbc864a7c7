"""Resizing, the random changes of training, and how an image becomes a model's input.

Every image is a uint8 array [H, W, 3], 0-255 sRGB; embedded colour profiles are ignored. Random
functions take a `numpy.random.Generator` and draw the same number of values whatever the image.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from capjax.data.decode import MAX_PIXELS, WHITE, ImageError, decode_image, decoder
from capjax.data.resize import FILTERS, Resample, resize, resize_box, resizer
from capjax.errors import UserError


def random_resized_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    antialias: bool = True,
    resample: Resample = "bilinear",
    exact: bool = False,
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
    return resize_box(image, box, (size, size), antialias, resample, exact)


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

    `exact`: Pillow's pixels to the bit, for weights that were trained on them, also where a faster
    resizer is installed (see `capjax.data.resize`).
    """

    image_size: int
    antialias: bool = True
    mode: Literal["stretch", "pad", "crop"] = "stretch"
    resample: Resample = "bilinear"
    resize_to: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size={self.image_size}: expected at least 1")
        if self.resize_to and self.resize_to < self.image_size:
            raise UserError(
                f"resize_to={self.resize_to}: expected 0, or image_size={self.image_size} or more"
            )
        if self.mode not in ("stretch", "pad", "crop"):
            raise UserError(f"mode={self.mode!r}: expected 'stretch', 'pad' or 'crop'")
        if self.resample not in FILTERS:
            raise UserError(f"resample={self.resample!r}: expected 'bilinear' or 'bicubic'")
        if self.resample != "bilinear" and not self.antialias:
            raise UserError(f"resample={self.resample!r}: expected 'bilinear' without antialias")

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [image_size, image_size, 3].

        Raises `ImageError` for a crop of an image so long that it had to be resized to more than
        `MAX_PIXELS` (at 224 pixels, from 1 x 1338).
        """
        square = self._squared(image, self.resize_to or self.image_size)
        return square[: self.image_size, : self.image_size]

    def _squared(self, image: np.ndarray, size: int) -> np.ndarray:
        height, width = image.shape[:2]
        if self.mode == "stretch" or height == width:
            return self._resize(image, (size, size))
        side = min(height, width) if self.mode == "crop" else max(height, width)
        if self.mode == "crop":
            whole = size * height // side, size * width // side
            if whole[0] * whole[1] > MAX_PIXELS:
                raise ImageError("too many pixels", f"{width}x{height} to {whole[1]}x{whole[0]}")
            resized = self._resize(image, whole)
            top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
            return resized[top : top + size, left : left + size]
        inner = (max(round(size * height / side), 1), max(round(size * width / side), 1))
        top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
        out = np.full((size, size, 3), WHITE, np.uint8)
        out[top : top + inner[0], left : left + inner[1]] = self._resize(image, inner)
        return out

    def _resize(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return resize(image, size, self.antialias, self.resample, self.exact)

    def made_by(self) -> dict[str, str]:
        """The packages that decode and resize here, which a checkpoint records."""
        return {
            "decoder": decoder(),
            "resizer": resizer(self.antialias, self.resample, self.exact),
        }

    def other_pixels(self, recorded: Mapping[str, str]) -> str:
        """How pixels are made here otherwise than `made_by` recorded, in a line; "": alike.

        What was not recorded is not compared.
        """
        here = self.made_by()
        others = [(what, by) for what, by in recorded.items() if here.get(what, by) != by]
        if not others:
            return ""
        said = " and ".join(f"the {what} was {by} and is {here[what]} here" for what, by in others)
        mend = " and ".join(
            f"pip uninstall {here[what]}" if by == "pillow" else f"pip install {by}"
            for what, by in others
        )
        return f"in training {said}: pixels may differ by a grey level of 255; {mend} for the same"

    def preprocess_bytes(self, data: bytes) -> np.ndarray:
        """Encoded bytes -> uint8 [image_size, image_size, 3]. Raises `ImageError`."""
        return self.preprocess(decode_image(data))
