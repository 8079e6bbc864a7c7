"""Captions of the same images at every evaluation, whatever became of the run in between."""

import pytest

from capjax.evaluation.over_time import IMAGES, keep_over_time, read_over_time
from capjax.evaluation.splits import CaptionRecord


def said(keys, step):
    return [
        CaptionRecord(f"k{i}", "here", i, f"{i} at {step}", [], False, 0.0, -1.0, 4, 1.0, 0, step)
        for i in keys
    ]


def test_the_images_stay_the_same(tmp_path):
    path = tmp_path / "val.jsonl"
    keep_over_time(path, said(range(0, 60, 3), 10), 10)  # every third of the split
    keep_over_time(path, said(range(60), 20), 20)  # the last evaluation takes all
    lines = read_over_time(path)
    assert [line["step"] for line in lines] == [10] * IMAGES + [20] * IMAGES
    keys = [f"k{3 * i}" for i in range(IMAGES)]
    assert [line["key"] for line in lines] == keys * 2
    assert lines[IMAGES + 1]["caption"] == "3 at 20"


def test_a_run_that_goes_on_from_an_earlier_step_replaces_later_ones(tmp_path):
    path = tmp_path / "val.jsonl"
    for step in (10, 20, 30):
        keep_over_time(path, said([step], step), step)
    assert [line["step"] for line in read_over_time(path)] == [10, 20, 30]
    keep_over_time(path, said([10], 20), 20)
    assert read_over_time(path) == [
        {"step": 10, "key": "k10", "caption": "10 at 10"},
        {"step": 20, "key": "k10", "caption": "10 at 20"},
    ]


@pytest.mark.parametrize("damage", [b'{"step": 1', b"[]\n", b"\xff\xfe\n", b'{"step": 1}\n'])
def test_a_damaged_line_is_left_out(tmp_path, damage):
    path = tmp_path / "val.jsonl"
    keep_over_time(path, said([1], 1), 1)
    path.write_bytes(path.read_bytes() + damage)
    assert [line["caption"] for line in read_over_time(path)] == ["1 at 1"]
    keep_over_time(path, said([1], 2), 2)
    assert [line["step"] for line in read_over_time(path)] == [1, 2]
