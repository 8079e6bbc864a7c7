"""Ranges of a corpus, their files, and what is shown of them."""

import io
import json

import numpy as np
import pytest
from pyarrow import parquet

from capjax.data.decode import ImageError
from capjax.decoding.corpus import Filters, Row, count_records, range_records
from capjax.decoding.corpus_files import MANIFEST, ShardDirectory
from capjax.decoding.corpus_meter import Meter
from capjax.decoding.corpus_records import encode_records, json_line
from capjax.decoding.corpus_share import Share
from capjax.decoding.options import DecodingOptions
from capjax.errors import UserError

PIXELS = np.zeros((2, 2, 3), np.uint8)


def rows(contents: str) -> list[Row]:
    """An image a letter; equal letters are equal images, a dot is none that can be read."""
    return [
        Row({"index": i, "key": f"k{i}"}, ImageError("no"), b"")
        if letter == "."
        else Row({"index": i, "key": f"k{i}"}, PIXELS, letter.encode())
        for i, letter in enumerate(contents)
    ]


def in_batches(size: int):
    """A captioner that runs a batch behind what it reads, as `LoadedModel.stream` does."""

    def caption(given):
        read = [*given]
        for start in range(0, len(read), size):
            for about, pixels in read[start : start + size]:
                made = {"error": "no"} if pixels is not PIXELS else {"caption": about["key"]}
                yield {**about, **made}

    return caption


@pytest.mark.parametrize("size", [1, 2, 9])
def test_duplicates_are_captioned_once_and_stay_in_place(size):
    made = list(range_records(rows("abaa.cbb"), in_batches(size)))
    assert [record["index"] for record in made] == list(range(8))
    assert [record.get("caption") for record in made] == [
        *("k0", "k1", "k0", "k0", None, "k5", "k1", "k1")
    ]
    duplicates = {r["key"]: r["duplicate_of"] for r in made if "duplicate_of" in r}
    assert duplicates == {"k2": "k0", "k3": "k0", "k6": "k1", "k7": "k1"}
    assert count_records(made) == {
        "records": 8, "captions": 7, "errors": 1, "filtered": 0, "duplicates": 4
    }  # fmt: skip


def test_filters_mark_a_record_by_its_first_caption():
    good = {"caption": "x", "logprob": -2.0, "num_tokens": 4}
    bad = {"caption": "y", "logprob": -2.5, "num_tokens": 4}
    filters = Filters(min_logprob=-0.5, max_tokens=4)
    assert filters.mark(good) == good
    assert filters.mark(bad) == {**bad, "filtered": "min_logprob"}
    both = {**good, "captions": [good, bad, {**good, "num_tokens": 5}]}
    marked = filters.mark(both)
    assert "filtered" not in marked
    assert [each.get("filtered") for each in marked["captions"]] == [
        *(None, "min_logprob", "max_tokens")
    ]
    assert Filters(min_tokens=5).mark(good)["filtered"] == "min_tokens"
    assert Filters(min_tokens=5).mark({"error": "no"}) == {"error": "no"}
    with pytest.raises(UserError, match="min_tokens=3 is above max_tokens=2"):
        Filters(min_tokens=3, max_tokens=2)


RECORDS = [
    {
        "index": 7,
        "key": "a\udcff.png",
        "references": ["x", "y"],
        "caption": "ein Hündchen",
        "logprob": -1.25,
        "num_tokens": 3,
        "finish": "end",
        "guidance_scale": (1.0, 2.0),
        "seed": 4294967295,
        "captions": [{"caption": "c", "logprob": -1.0, "num_tokens": 1, "finish": "length"}],
    },
    {"index": 8, "key": "b", "error": "no"},
]


def test_both_formats_hold_the_same():
    options = DecodingOptions(guidance_scale=(1.0, 2.0))
    lines = encode_records(RECORDS, "jsonl", options).splitlines()
    assert json.loads(lines[0]) == {**RECORDS[0], "guidance_scale": [1.0, 2.0]}
    assert "ü".encode() in json_line({"key": "ü"})
    data = encode_records(RECORDS, "parquet", options)
    assert encode_records(RECORDS, "parquet", options) == data
    for found, record in zip(
        parquet.read_table(io.BytesIO(data)).to_pylist(), RECORDS, strict=True
    ):
        for name, value in found.items():
            if name == "key":
                assert value == record["key"].replace("\udcff", "?")
            elif name == "captions" and value:
                assert value == [{**record["captions"][0], "filtered": None}]
            elif name == "guidance_scale" and value:
                assert tuple(value) == record["guidance_scale"]
            else:
                assert value == record.get(name)


JOB = {"options": {"top_k": 0}, "seed": 1}


def opened(path, job=JOB, share=Share(), num_records=5):  # noqa: B008
    sizes = {"num_records": num_records, "shard_size": 2, "kind": "jsonl"}
    return ShardDirectory(path, job, DecodingOptions(), **sizes, share=share)


def record(i: int) -> dict:
    return {"index": i, "key": str(i), "caption": "x" * i}


def write(directory: ShardDirectory, number: int) -> None:
    directory.write(number, [record(i) for i in range(*directory.bounds(number))])


def contents(path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir() if each.is_file()}


def test_a_shard_is_there_whole_or_is_missing(tmp_path):
    with opened(tmp_path / "a") as directory:
        assert directory.missing() == [0, 1, 2]
        write(directory, 1)
        assert directory.missing() == [0, 2]
        assert directory.finish() is None
    (tmp_path / "a" / ".captions-00000-of-00003.jsonl.77.tmp").write_text("torn")
    (tmp_path / "a" / ".shards" / ".00002.json.77.tmp").write_text("torn")
    shard = tmp_path / "a" / "captions-00001-of-00003.jsonl"
    shard.write_bytes(shard.read_bytes()[:-3])
    with opened(tmp_path / "a") as directory:
        assert directory.missing() == [0, 1, 2]
        for number in directory.missing():
            write(directory, number)
        manifest = directory.finish()
    assert json.loads((tmp_path / "a" / MANIFEST).read_text()) == manifest
    assert manifest["counts"]["captions"] == 5
    assert [shard["records"] for shard in manifest["shards"]] == [2, 2, 1]
    assert not list(tmp_path.rglob("*.tmp"))
    assert set(contents(tmp_path / "a")) == {
        MANIFEST, "job.json", *(shard["name"] for shard in manifest["shards"])
    }  # fmt: skip


def test_processes_share_the_shards_and_the_last_completes_the_manifest(tmp_path):
    with opened(tmp_path / "one") as directory:
        for number in directory.missing():
            write(directory, number)
        directory.finish()
    first, second = (opened(tmp_path / "two", share=Share(i, 2)) for i in range(2))
    assert (first.missing(), second.missing()) == ([0, 2], [1])
    with pytest.raises(UserError, match="being written by another process 1 of 2"):
        opened(tmp_path / "two", share=Share(1, 2))
    write(second, 1)
    assert second.finish() is None
    write(first, 0)
    write(first, 2)
    assert first.finish() == second.finish()
    first.close()
    second.close()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_another_job_or_other_files_are_refused(tmp_path):
    opened(tmp_path / "a").close()
    before = contents(tmp_path / "a")
    # An option of a newer version was, when the job was begun, what it is by default.
    opened(tmp_path / "a", {"options": {"top_k": 0, "draft_length": 0}, "seed": 1}).close()
    with pytest.raises(UserError, match=r"options.draft_length: 0 -> 3"):
        opened(tmp_path / "a", {"options": {"top_k": 0, "draft_length": 3}, "seed": 1})
    with pytest.raises(UserError, match=r"another job \(options.top_k: 0 -> 5; seed: 1 -> 2\)"):
        opened(tmp_path / "a", {"options": {"top_k": 5}, "seed": 2})
    assert contents(tmp_path / "a") == before
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds other files \(mine.txt\)"):
        opened(tmp_path / "b")
    with pytest.raises(UserError, match="is a file"):
        opened(tmp_path / "b" / "mine.txt")
    assert contents(tmp_path / "b") == {"mine.txt": b"x"}


def test_a_meter_counts_from_the_first_batch_on():
    now = [0.0]
    shown = []
    meter = Meter(100, 6, 2, price_per_hour=36.0, show=shown.append, clock=lambda: now[0])

    def images():
        for i in range(6):
            now[0] += 10.0 if i < 2 else 0.5
            yield i

    for i in meter.reading(images()):
        if i % 2 == 0:
            continue
        for key in (i - 1, i):
            meter.made({"key": str(key), **({"error": "no"} if key == 3 else {"caption": ""})})
            with meter.waiting("output"):
                now[0] += 0.25
    # From the first record on: four images in 3.5 s, of which 2 and 1.5 were spent waiting.
    assert meter.rate() == pytest.approx(4 / 3.5)
    assert (meter.counts["errors"], meter.first_error) == (1, "3: no")
    assert shown[0].startswith("3/6 images  ")
    assert "waiting: input 57.1%, output 42.9%" in meter.summary()
    assert f"cost of all 100 images: {100 / (4 / 3.5) / 3600 * 36:.4g}" in meter.summary()
    assert Meter(1, 1, 2).summary() is None
