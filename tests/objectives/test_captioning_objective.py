"""Settings of the captioning objective that are refused, and those that follow from others."""

import pytest

from capjax.errors import UserError
from capjax.objectives.captioning_objective import CaptioningObjective


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("weight", -1.0, "expected 0 or more"),
        ("parallel_fraction", 1.5, "expected 0 .Cap. to 1"),
        ("parallel_draw", "sorted", "choose bernoulli or fixed"),
        ("masking_ratio", 0.0, "expected more than 0, to 1"),
        ("image_dropout", -0.1, "expected 0 to 1"),
        ("label_smoothing", 1.0, "expected 0 to less than 1"),
        ("z_loss", float("nan"), "expected 0 or more"),
        ("normalization", "batch", "choose caption or token"),
    ],
)
def test_a_wrong_value_is_named(field, value, expected):
    with pytest.raises(UserError, match=rf"objective\.captioning\.{field}=.*: {expected}"):
        CaptioningObjective(**{field: value})


def test_the_fixed_draw_takes_fractions_of_small_groups():
    CaptioningObjective(parallel_fraction=0.7)
    with pytest.raises(UserError, match="nearest is 5/7"):
        CaptioningObjective(parallel_fraction=0.7, parallel_draw="fixed")


def test_rows_that_must_stay_together():
    fixed = CaptioningObjective(parallel_draw="fixed")
    assert (fixed.group_causal, fixed.group_size) == (1, 4)
    assert [fixed.rows_together(captions) for captions in (1, 2, 3, 4, 5)] == [4, 2, 4, 1, 4]
    assert CaptioningObjective().rows_together() == 1
    alone = CaptioningObjective(parallel_draw="fixed", parallel_fraction=1.0)
    assert alone.rows_together() == 1
