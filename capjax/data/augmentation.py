"""Random changes of a training image, none of which makes its caption false.

Pure functions of the image, its caption and a `numpy.random.Generator`, of which the caption
changes no draw.
"""

import dataclasses
import re
from typing import Literal

import numpy as np

from capjax.data import images
from capjax.data.images import ImagePreprocessing
from capjax.errors import UserError

# Words that a mirrored picture would make false: sides, turns, the compass, and clock faces.
_SIDE = re.compile(
    r"\b(?:(?:left|right)(?:s|ward|wards|most|hand|handed)?"
    r"|(?:counter|anti)?[- ]?clockwise"
    r"|(?:north|south)?[- ]?(?:east|west)(?:ern|ward|wards)?"
    r"|o[’']?clock|(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)-thirty)\b",
    re.IGNORECASE,
)


def names_a_side(text: str) -> bool:
    """Whether a mirrored picture could make the text false ("left", "clockwise", "west", …)."""
    return _SIDE.search(text) is not None


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random changes of a training image; the default is none.

    `crop_scale`: range of the share of the area kept, (1, 1) for no crop; `crop_ratio`: range of
    the crop's width / height; `shift_pixels`: largest shift after resizing, with `shift_fill` for
    what comes into view; `flip`: mirror half of the images, never one whose caption
    `names_a_side`; `color_jitter`: strength, 0.2 for factors in 0.8-1.2.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    shift_pixels: int = 0
    shift_fill: Literal["white", "edge"] = "white"
    flip: bool = False
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        checks = {
            "crop_scale": (
                "0 < low <= high <= 1",
                0 < self.crop_scale[0] <= self.crop_scale[1] <= 1,
            ),
            "crop_ratio": ("0 < low <= high", 0 < self.crop_ratio[0] <= self.crop_ratio[1]),
            "shift_pixels": ("at least 0", self.shift_pixels >= 0),
            "shift_fill": ("'white' or 'edge'", self.shift_fill in ("white", "edge")),
            "color_jitter": ("0 <= strength < 1", 0 <= self.color_jitter < 1),
        }
        for field, (expected, ok) in checks.items():
            if not ok:
                value = getattr(self, field)
                raise UserError(f"augment.{field}={value!r}: expected {expected}")


def augment_image(
    image: np.ndarray,
    text: str,
    preprocessing: ImagePreprocessing,
    augment: Augment,
    rng: np.random.Generator,
) -> np.ndarray:
    """uint8 [H, W, 3] and its caption -> uint8 [S, S, 3], S = `preprocessing.image_size`.

    A crop takes the place of `preprocessing.mode`; without one the image is preprocessed as in
    evaluation. Then shift, mirror, colours.
    """
    mirror = rng.random() < 0.5
    size = preprocessing.image_size
    if augment.crop_scale[0] < 1:
        scale, ratio = augment.crop_scale, augment.crop_ratio
        image = images.random_resized_crop(
            image,
            size,
            rng,
            scale,
            ratio,
            preprocessing.antialias,
            preprocessing.resample,
            preprocessing.exact,
        )
    else:
        image = preprocessing.preprocess(image)
    if augment.shift_pixels:
        image = images.random_shift(image, augment.shift_pixels, rng, augment.shift_fill)
    if augment.flip and mirror and not names_a_side(text):
        image = images.flip(image)
    if augment.color_jitter:
        image = images.color_jitter(image, augment.color_jitter, rng)
    return image
