import contextlib
import pickle
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from capjax.data.records import (
    ArrayRecordSource,
    Caption,
    CorruptRecord,
    Example,
    checked_index,
    decode_example,
    encode_example,
    record_writer,
    write_shards,
)
from capjax.errors import UserError

text = st.text(st.characters(codec="utf-8"), max_size=20)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | text
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
side = st.floats(allow_nan=False) | st.integers(-(2**31), 2**31).map(float)
examples = st.builds(
    Example,
    key=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    image=st.binary(min_size=1, max_size=50),
    captions=st.lists(st.builds(Caption, text, text, text), max_size=4).map(tuple),
    label=st.none() | st.integers(-(2**63), 2**63),
    boxes=st.none() | st.lists(st.tuples(side, side, side, side), max_size=3).map(tuple),
    metadata=st.dictionaries(text, plain, max_size=3),
)


@settings(deadline=None)  # the machine may be busy
@given(examples)
def test_example_survives_the_round_trip(example):
    decoded = decode_example(encode_example(example))
    assert decoded == example
    assert type(decoded.captions) is tuple
    assert all(type(caption) is Caption for caption in decoded.captions)


@settings(deadline=None)  # the machine may be busy
@given(examples, st.data())
def test_damaged_bytes_give_an_example_or_a_value_error(example, data):
    content = bytearray(encode_example(example))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ValueError):
        assert isinstance(decode_example(bytes(content)), Example)


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"image": b"x"}, "image and others"),
        ({"key": "k", "image": b"x", "colour": 1}, "colour"),
        ({"key": "", "image": b"x"}, "`key`"),
        ({"key": "k", "image": b""}, "`image`"),
        ({"key": "k", "image": "x"}, "`image`"),
        ({"key": "k", "image": b"x", "captions": "words"}, "`captions`"),
        ({"key": "k", "image": b"x", "captions": [["tts", "en"]]}, "`captions`"),
        ({"key": "k", "image": b"x", "captions": [["tts", "en", 1]]}, "`captions`"),
        ({"key": "k", "image": b"x", "label": 1.0}, "`label`"),
        ({"key": "k", "image": b"x", "label": True}, "`label`"),
        ({"key": "k", "image": b"x", "boxes": [[1, 2, 3]]}, "`boxes`"),
        ({"key": "k", "image": b"x", "boxes": [[1, 2, 3, "4"]]}, "`boxes`"),
        ({"key": "k", "image": b"x", "metadata": {1: 2}}, "int is not allowed"),
        ({"key": "k", "image": b"x", "metadata": {"a": {"b": msgpack.ExtType(1, b"")}}}, "a.b"),
        ({"key": "k", "image": b"x", "metadata": []}, "`metadata`"),
        ([1, 2], r"got \[1, 2\]"),
    ],
)
def test_unfit_record_is_refused_by_name(record, field):
    with pytest.raises(ValueError, match=field):
        decode_example(msgpack.packb(record))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"a": (1, 2)}, "metadata.a"),
        ({"a": {2: 3}}, "string keys"),
        ({"a": {"b": {1, 2}}}, "metadata.a.b"),
        ({"a": 2**80}, "does not fit"),
        ({"a": "\ud800"}, "does not fit"),
    ],
)
def test_what_would_not_come_back_the_same_is_not_written(metadata, reason):
    with pytest.raises(ValueError, match=reason):
        encode_example(Example("k", b"x", metadata=metadata))


def make_examples(count: int) -> list[Example]:
    rng = random.Random(0)
    return [
        Example(f"key{i}", rng.randbytes(3000), (Caption(f"caption {i}", "tts"),), i)
        for i in range(count)
    ]


@pytest.fixture
def shards(tmp_path):
    return write_shards(make_examples(10), tmp_path, "part", shard_size=4)


def test_shards_are_named_and_hold_the_examples_in_order(shards, tmp_path):
    names = [f"part-0000{i}-of-00003.array_record" for i in range(3)]
    assert [path.name for path in shards] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == names, "temporary files are gone"
    source = ArrayRecordSource(shards)
    assert [source[i] for i in range(len(source))] == make_examples(10)
    assert len(ArrayRecordSource(shards[2])) == 2


def test_writing_twice_gives_the_same_bytes(shards, tmp_path):
    again = write_shards(make_examples(10), tmp_path / "again", "part", shard_size=4)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in shards]


def test_failed_writing_leaves_nothing(tmp_path):
    def failing():
        yield from make_examples(5)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_shards(failing(), tmp_path, "part", shard_size=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("count", "size", "reason"), [(0, 4, "no examples"), (1, 0, "at least 1")])
def test_nothing_to_write_is_refused(tmp_path, count, size, reason):
    with pytest.raises(ValueError, match=reason):
        write_shards(make_examples(count), tmp_path, "part", shard_size=size)


@pytest.mark.parametrize("index", [-1, 10, 10**9])
def test_index_outside_is_refused(shards, index):
    with pytest.raises(IndexError, match="0 <= index < 10"):
        ArrayRecordSource(shards)[index]


def test_source_pickles_to_its_paths_and_reopens(shards):
    source = ArrayRecordSource(shards)
    assert "10 examples" in repr(source)
    content = pickle.dumps(source)
    assert len(content) < 1000
    copy = pickle.loads(content)
    assert [copy[i] for i in range(10)] == make_examples(10)
    assert repr(copy) == repr(source)


def test_threads_share_a_source(shards):
    source = pickle.loads(pickle.dumps(ArrayRecordSource(shards)))  # so that threads also open
    expected = make_examples(10)
    with ThreadPoolExecutor(8) as pool:
        rows = [i % 10 for i in range(2000)]
        read = list(pool.map(source.__getitem__, rows))
    assert read == [expected[i] for i in rows]


@pytest.mark.parametrize(
    "damage", ["half", "one byte less", "empty", "garbage", "other", "missing"]
)
def test_damaged_file_is_named_when_opened(shards, damage):
    content = shards[1].read_bytes()
    damaged = {
        "half": content[: len(content) // 2],
        "one byte less": content[:-1],
        "empty": b"",
        "garbage": random.Random(0).randbytes(200_000),
        "other": b"PK\x03\x04" + bytes(100_000),
    }
    if damage == "missing":
        shards[1].unlink()
    else:
        shards[1].write_bytes(damaged[damage])
    with pytest.raises(UserError) as caught:
        ArrayRecordSource(shards)
    assert str(shards[1]) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_is_refused():
    with pytest.raises(UserError, match="at least one path"):
        ArrayRecordSource([])


def test_flipped_bits_cost_at_most_a_record_and_never_change_one(shards, tmp_path):
    expected = make_examples(10)[:4]
    content = shards[0].read_bytes()
    used = content.rindex(expected[3].image[-100:]) + 200  # behind it there is padding
    rng = random.Random(1)
    path = tmp_path / "flipped.array_record"
    outcomes = {"whole": 0, "one unreadable": 0, "refused": 0}
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.randrange(used)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            source = ArrayRecordSource(path)
        except UserError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
            continue
        lost = 0
        for i, example in enumerate(expected):
            try:
                assert source[i] == example
            except CorruptRecord as error:
                assert (error.shard, error.index) == (str(path), i)
                lost += 1
        assert lost <= 1
        outcomes["one unreadable" if lost else "whole"] += 1
    assert outcomes["one unreadable"] > 150, outcomes


def test_foreign_record_is_corrupt_and_its_error_pickles(shards, tmp_path):
    path = tmp_path / "foreign.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    writer.write(encode_example(make_examples(1)[0]))
    writer.write(b"\xffnot an example")
    writer.close()
    source = ArrayRecordSource([*shards, path])
    assert source[10].key == "key0"
    with pytest.raises(CorruptRecord, match="record 1 cannot be read: not a msgpack") as caught:
        source[11]
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.shard, copy.index, str(copy)) == (str(path), 1, str(caught.value))


def test_file_that_shrank_since_it_was_opened_gives_corrupt_records(shards, tmp_path):
    source = pickle.loads(pickle.dumps(ArrayRecordSource(shards)))
    shutil.copyfile(shards[2], shards[0])
    with pytest.raises(CorruptRecord, match="record 3"):
        source[3]
    Path(shards[1]).unlink()
    with pytest.raises(UserError, match="no ArrayRecord file"):
        source[5]


def test_a_full_disk_is_an_error_that_says_so():
    with (
        pytest.raises(UserError, match=r"cannot write /dev/full .*No space left"),
        record_writer(Path("/dev/full")) as write,
    ):
        for _ in range(64):
            write(b"x" * 100_000)


def test_an_index_outside_the_source_names_the_source():
    assert checked_index(np.int64(2), [1, 2, 3]) == 2
    for index in (-1, 3):
        with pytest.raises(IndexError, match=rf"row {index} of \[1, 2, 3\]: .* 0 <= index < 3"):
            checked_index(index, [1, 2, 3], "row")
