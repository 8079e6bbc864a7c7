"""The gallery's data: which images, their measures in the right order, and its limits."""

import json

import numpy as np
import pytest

from capjax.data.sources import open_source
from capjax.reporting import gallery as gallery_module
from capjax.reporting.gallery import gallery, shares
from capjax.reporting.runs import read_runs
from capjax.reporting.thumbnails import NONE, Thumbnails


@pytest.fixture
def runs(tmp_path, make_run):
    return read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", shift=0.5)])


def test_small_splits_are_shown_whole_and_the_rest_share():
    sizes = {"style": 3426, "val": 189, "concept": 124, "composition": 366}
    given = shares(sizes, 1000)
    assert given == {"concept": 124, "val": 189, "composition": 343, "style": 344}
    assert shares({"a": 5}, 1000) == {"a": 5}
    assert shares({}, 10) == {}


def test_every_measure_is_that_of_its_key(runs):
    data = gallery(runs, seed=0, max_images=1000)
    (split,) = data["splits"]
    keys = [record["key"] for record in runs[0].captions["concept"]]
    assert sorted(split["keys"]) == sorted(keys)
    assert split["keys"] != keys  # drawn
    for run, said in zip(runs, split["runs"], strict=True):
        captions = {record["key"]: record["caption"] for record in run.captions["concept"]}
        items = run.evaluations["concept"].items
        for place, key in enumerate(split["keys"]):
            row = keys.index(key)
            assert said["captions"][place] == captions[key]
            value = said["measures"]["cider_d"][place]
            assert value == (None if row == 7 else pytest.approx(items["cider_d"][row], rel=1e-3))
            assert said["found"]["image"][place] == (keys[row - 1] if row % 3 == 0 else None)
            assert said["found"]["text"][place] == ("another text" if row == 4 else None)
    assert set(split["others"]) == {keys[row - 1] for row in range(0, 30, 3)}
    json.dumps(data, allow_nan=False)


def test_the_seed_draws_right_and_wrong_alike(runs):
    drawn = [gallery(runs, seed=seed, max_images=10)["splits"][0] for seed in (0, 0, 1)]
    assert drawn[0]["keys"] == drawn[1]["keys"] != drawn[2]["keys"]
    assert len(drawn[0]["keys"]) == 10
    assert drawn[0]["total"] == 30
    assert len({*drawn[0]["images"]}) == 10
    assert 0 < sum(drawn[0]["runs"][0]["measures"]["exact_match"]) < 10


def test_attention_is_of_the_caption_that_is_shown_and_within_its_limit(runs, monkeypatch):
    data = gallery(runs, seed=0, max_images=1000)
    assert data["attention"] == {"shown": 58, "left_out": 0}  # not of the script, of three words
    runs[0].captions["concept"][5]["caption"] = "what a later checkpoint says"
    assert gallery(runs, seed=0, max_images=1000)["attention"]["shown"] == 57
    runs[0].captions["concept"][5]["caption"] = "caption 5 and more"  # of which maps are a part
    assert gallery(runs, seed=0, max_images=1000)["attention"]["shown"] == 57
    runs[0].captions["concept"][5]["caption"] = ""  # of no word
    key = runs[0].captions["concept"][5]["key"]
    maps = runs[0].attention["concept"]
    maps[key] = maps[key]._replace(words=[], weights=maps[key].weights[:0])
    assert gallery(runs, seed=0, max_images=1000)["attention"]["shown"] == 57
    monkeypatch.setattr(gallery_module, "MAX_ATTENTION_BYTES", 24)  # two images of 2 x 6 bytes
    assert gallery(runs, seed=0, max_images=1000)["attention"] == {"shown": 2, "left_out": 55}


def test_data_that_are_gone_leave_the_captions(runs):
    for record in runs[0].captions["concept"]:
        record["source"] = "no/such/place"
    data = gallery(runs[:1], seed=0, max_images=1000)
    assert data["images"] == []
    assert {*data["splits"][0]["images"]} == {NONE}


def test_each_picture_is_made_once_and_extra_ones_within_their_limit():
    thumbnails = Thumbnails(max_extra=1)
    source = open_source("emoji:concept")

    def record(index):
        return {"source": "emoji:concept", "index": index, "key": source[index].key}

    assert [thumbnails.number(record(3)), thumbnails.number(record(3))] == [0, 0]
    numbers = [thumbnails.number(record(i), extra=True) for i in (3, 4, 5, 4)]
    assert numbers == [0, 1, NONE, 1]
    assert thumbnails.number({}) == NONE
    assert (len(thumbnails.images), thumbnails.moved) == (2, 0)


def test_a_picture_of_another_key_is_not_shown(runs):
    for record in runs[0].captions["concept"]:  # as if a file before them had been deleted
        record["index"] += 1
    data = gallery(runs[:1], seed=0, max_images=1000)
    assert (data["images"], data["moved"]) == ([], 30)
    thumbnails = Thumbnails()
    key = open_source("emoji:concept")[3].key
    record = {"source": "emoji:concept", "index": 3, "key": f"{key}#3"}  # repeated there
    assert thumbnails.number(record) == 0
    assert thumbnails.number(record | {"key": f"{key}#4"}) == NONE
    assert thumbnails.number(record | {"index": 10**6}) == NONE
    assert thumbnails.moved == 2


def test_nothing_agrees_with_references_that_are_not_there(runs):
    records = runs[0].captions["concept"]
    records[4]["references"] = []
    (split,) = gallery(runs[:1], seed=0, max_images=1000)["splits"]
    place, measures = split["keys"].index(records[4]["key"]), split["runs"][0]["measures"]
    assert [measures[name][place] for name in ("exact_match", "unigram_f1")] == [None, None]
    assert measures["logprob"][place] == -1
    assert measures["exact_match"].count(None) == 1
    for record in records:
        record["references"] = []
    (split,) = gallery(runs[:1], seed=0, max_images=1000)["splits"]
    assert "exact_match" not in split["runs"][0]["measures"]


def test_a_key_without_an_evaluation_has_no_measure(runs):
    measured = runs[0].evaluations["concept"]
    few = measured._replace(
        keys=measured.keys[:3], items={k: np.asarray(v)[:3] for k, v in measured.items.items()}
    )
    run = runs[0]._replace(evaluations={"concept": few})
    (split,) = gallery([run], seed=0, max_images=1000)["splits"]
    values = dict(zip(split["keys"], split["runs"][0]["measures"]["cider_d"], strict=True))
    assert {key for key, value in values.items() if value is not None} == {*measured.keys[:3]}
