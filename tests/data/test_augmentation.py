"""Augmentation: sides, and a fixed number of draws."""

import numpy as np
import pytest

from capjax.data.augmentation import Augment, augment_image, names_a_side
from capjax.data.images import ImagePreprocessing
from capjax.errors import UserError


@pytest.mark.parametrize(
    "text",
    [
        *("left arrow", "a hand pointing RIGHT", "magnifying glass tilted left", "leftwards hand"),
        *("right-facing fist", "person: right, running", "clockwise arrows", "two o’clock"),
        *("counterclockwise arrows button", "anti-clockwise", "northeast arrow", "western union"),
        *("ten-thirty", "left-handed", "rightmost", "turning eastward"),
    ],
)
def test_texts_that_name_a_side(text):
    assert names_a_side(text)


@pytest.mark.parametrize(
    "text",
    ["bright star", "copyright", "upright piano", "leftovers", "alarm clock", "beast", "feast"],
)
def test_texts_that_name_none(text):
    assert not names_a_side(text)


IMAGE = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
PREPROCESSING = ImagePreprocessing(16)


def test_the_default_is_the_preprocessing_of_evaluation():
    for mode in ("stretch", "pad", "crop"):
        preprocessing = ImagePreprocessing(12, mode=mode)
        wide = np.concatenate([IMAGE, IMAGE], 1)
        out = augment_image(wide, "a", preprocessing, Augment(), np.random.default_rng(0))
        np.testing.assert_array_equal(out, preprocessing.preprocess(wide))


def test_half_are_mirrored_but_never_where_a_side_is_named():
    def mirrored(text: str) -> float:
        rng = np.random.default_rng(0)
        outs = [
            augment_image(IMAGE, text, PREPROCESSING, Augment(flip=True), rng) for _ in range(400)
        ]
        flipped = [np.array_equal(out, IMAGE[:, ::-1]) for out in outs]
        assert all(flipped[i] or np.array_equal(out, IMAGE) for i, out in enumerate(outs))
        return float(np.mean(flipped))

    assert abs(mirrored("a cat") - 0.5) < 0.08
    assert mirrored("left arrow") == 0


def test_the_caption_does_not_change_the_other_draws():
    augment = Augment(crop_scale=(0.5, 1.0), shift_pixels=2, flip=True, color_jitter=0.2)
    for seed in range(20):
        free = augment_image(IMAGE, "a", PREPROCESSING, augment, np.random.default_rng(seed))
        bound = augment_image(IMAGE, "left", PREPROCESSING, augment, np.random.default_rng(seed))
        assert np.array_equal(free, bound) or np.array_equal(free[:, ::-1], bound)
        again = augment_image(IMAGE, "a", PREPROCESSING, augment, np.random.default_rng(seed))
        np.testing.assert_array_equal(free, again)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.9, 0.5)),
        ("crop_scale", (0.5, 1.5)),
        ("crop_ratio", (0.0, 1.0)),
        ("shift_pixels", -1),
        ("color_jitter", 1.0),
    ],
)
def test_impossible_augmentation_is_refused(field, value):
    with pytest.raises(UserError, match=rf"augment\.{field}"):
        Augment(**{field: value})
