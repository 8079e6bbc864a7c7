"""Results of evaluations: kept, read again, and put together."""

import json

import numpy as np
import pytest

from capjax.errors import UserError
from capjax.evaluation.measured import Measured, join, read_measured, write_measured

CAPTIONS = Measured(
    {"cider_d": 1.5, "perplexity": float("inf")},
    {"cider_d": np.array([1.0, 2.0])},
    ("b", "a"),
    {"cider_d": (0.5, 2.5)},
    {"spice": "no parser"},
    {"tokenizer": "ptb"},
)
RETRIEVAL = Measured(
    {"rank": 2.0},
    {"rank": np.array([1, 2, 3]), "nearest": np.array(["x", "y", "z"], object)},
    ("a", "b", "c"),
)


def test_kept_and_read_again(tmp_path):
    write_measured(tmp_path / "val.json", CAPTIONS)
    again = read_measured(tmp_path / "val.json")
    assert json.loads((tmp_path / "val.json").read_text())["metrics"]["perplexity"] is None
    assert again.metrics["cider_d"] == 1.5 and np.isnan(again.metrics["perplexity"])
    assert again.items["cider_d"].tolist() == [1.0, 2.0]
    assert again[2:] == CAPTIONS[2:]
    for text in ("", "[]", "{}", '{"metrics": 3}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="not a file that `capjax evaluate` wrote"):
            read_measured(tmp_path / "bad.json")


def test_items_lie_beside_each_other_by_key():
    joined = join({"captions": CAPTIONS, "retrieval": RETRIEVAL, "loss": Measured({"loss": 2.0})})
    assert joined.keys == ("b", "a", "c")
    np.testing.assert_array_equal(joined.items["cider_d"], [1.0, 2.0, np.nan])
    np.testing.assert_array_equal(joined.items["rank"], [2, 1, 3])
    assert joined.items["nearest"].tolist() == ["y", "x", "z"]
    assert joined.metrics.keys() == {"cider_d", "perplexity", "rank", "loss"}
    assert joined.intervals == CAPTIONS.intervals and joined.skipped == CAPTIONS.skipped
    with pytest.raises(ValueError, match=r"again: \['loss'\] measured twice"):
        join({"loss": Measured({"loss": 2.0}), "again": Measured({"loss": 2.0})})
