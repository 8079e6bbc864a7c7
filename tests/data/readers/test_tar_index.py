import multiprocessing
import os
import random
import resource
import struct
import tracemalloc
import zlib
from pathlib import Path

import fsspec
import msgpack
import numpy as np
import pytest
import webdataset

from capjax.data import files
from capjax.data.readers import tar_index_files
from capjax.data.readers.tar_index import TarIndex
from capjax.data.readers.tar_index_files import load_index
from capjax.data.readers.webdataset import WebDataset
from capjax.data.records import CorruptRecord, Example
from capjax.data.sources import open_source
from capjax.errors import UserError


def write_tar(path, count=5, size=50):
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(count):
            image = random.Random(i).randbytes(size)
            writer.write({"__key__": f"{i:03d}", "jpg": image, "txt": f"t{i}", "json": {"i": i}})
    return str(path)


@pytest.fixture
def tar(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (tmp_path / "in").mkdir()
    return write_tar(tmp_path / "in" / "x.tar")


@pytest.fixture
def builds(monkeypatch):
    """The paths of tars whose headers were read."""
    seen, build = [], tar_index_files.build_index
    monkeypatch.setattr(
        tar_index_files, "build_index", lambda path, *more: seen.append(path) or build(path, *more)
    )
    return seen


def index_names(tar):
    return [path.name for path in (Path(tar).parent / ".capjax-index").iterdir()]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_index_is_kept_beside_the_tar_and_made_again_when_it_changes(tar, builds):
    first = load_index(tar, None)[1]
    assert same(load_index(tar, None)[1], first)
    assert builds == [tar]
    write_tar(tar, count=6)
    assert len(load_index(tar, None)[1]) == 6
    os.utime(tar, (1, 1))
    load_index(tar, None)
    load_index(tar, None)
    assert len(builds) == 3
    assert index_names(tar) == ["x.tar.index"]


def test_index_lies_where_it_is_told_or_can(tar, tmp_path, builds, monkeypatch):
    load_index(tar, str(tmp_path / "here"))
    load_index(tar, str(tmp_path / "here"))
    assert len(list((tmp_path / "here").iterdir())) == len(builds) == 1
    (tmp_path / "in" / ".capjax-index").write_text("no directory can be here")
    load_index(tar, None)
    load_index(tar, None)
    assert len(list((tmp_path / "user/capjax/webdataset").iterdir())) == 1
    assert len(builds) == 2
    with pytest.raises(UserError, match=r"cache=.*/x\.tar: cannot write the index"):
        load_index(tar, tar)
    monkeypatch.setenv("XDG_CACHE_HOME", tar)
    assert len(load_index(tar, None)[1]) == 5, "nowhere to write: made each time"


def test_damaged_index_is_made_again(tar, builds):
    expected = load_index(tar, None)[1]
    path = tar_index_files._index_files(tar, None)[0]
    content = path.read_bytes()
    rng = random.Random(0)
    damaged = [b"", content[:3], content[:-1], content + b"x", rng.randbytes(500)]
    for _ in range(60):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        assert same(load_index(tar, None)[1], expected)
        assert path.read_bytes() == content
    assert len(builds) == 1 + len(damaged)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 0),
        ("tar", [1, "yesterday"]),
        ("offset", struct.pack("=15q", *[1 << 62] * 15)),
        ("offset", struct.pack("=15q", *[-1] * 15)),
        ("offset", b""),
        ("offset", b"odd"),
        ("size", None),
        ("extension", struct.pack("=15I", *[9] * 15)),
        ("member_ends", struct.pack("=5I", 15, 15, 15, 15, 15)),
        ("key_ends", struct.pack("=5I", 9, 3, 6, 9, 15)),
        ("keys", b""),
        ("extensions", 7),
    ],
)
def test_foreign_index_of_sound_checksum_is_made_again(tar, builds, field, value):
    load_index(tar, None)
    path = tar_index_files._index_files(tar, None)[0]
    record = msgpack.unpackb(path.read_bytes()[4:])
    if value is None:
        del record[field]
    else:
        record[field] = value
    body = msgpack.packb(record)
    path.write_bytes(struct.pack("<I", zlib.crc32(body)) + body)
    assert load_index(tar, None)[1].key(4) == "004"
    assert len(builds) == 2


def _load_often(tar, results):
    for _ in range(20):
        tar_index_files._index_files(tar, None)[0].unlink(missing_ok=True)
        results.put(len(load_index(tar, None)[1]))


def test_processes_may_race(tar):
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    racers = [context.Process(target=_load_often, args=(tar, results)) for _ in range(4)]
    for racer in racers:
        racer.start()
    assert [results.get() for _ in range(80)] == [5] * 80
    for racer in racers:
        racer.join()
    assert index_names(tar) in ([], ["x.tar.index"])


def test_only_headers_are_read(tar, monkeypatch):
    write_tar(tar, count=20, size=100_000)
    read, pread = [], os.pread
    monkeypatch.setattr(
        os, "pread", lambda fd, length, at: read.append(length) or pread(fd, length, at)
    )
    load_index(tar, None)
    assert sum(read) < 61 * 2000, "pax headers too, and none of 2 MB of data"


def test_remote_tar_is_indexed_in_large_reads(tar, monkeypatch):
    write_tar(tar, count=300, size=100_000)
    fsspec.filesystem("memory").pipe("/far/x.tar", Path(tar).read_bytes())
    reads, read_bytes = [], files.read_bytes
    monkeypatch.setattr(
        tar_index_files,
        "read_bytes",
        lambda path, start, length: reads.append(length) or read_bytes(path, start, length),
    )
    assert same(load_index("memory://far/x.tar", None)[1], load_index(tar, None)[1])
    assert len(reads) == 4, "30 MB by 8 MiB"


def test_a_million_samples_take_little_memory(tar, monkeypatch):
    """100 tars of 10 000 samples of three members: loaded, pickled size and the look-up."""
    count, extensions = 10_000, ("jpg", "txt", "json")
    keys = b"".join(b"%09d" % i for i in range(count))
    offset = 512 + 1024 * np.arange(3 * count)
    index = TarIndex(
        keys=np.frombuffer(keys, "B"),
        key_ends=np.arange(9, 9 * count + 9, 9, "I"),
        member_ends=np.arange(3, 3 * count + 3, 3, "I"),
        extension=np.tile(np.arange(3, dtype="I"), count),
        offset=offset,
        size=np.full(3 * count, 512, "I"),
        extensions=extensions,
        damage="",
    )
    state = files.FileState(1024 * 3 * count + 1024, "1")
    monkeypatch.setattr(tar_index_files, "state", lambda path: state)
    tar_index_files._write(
        tar_index_files._index_files(tar, None)[0], tar_index_files._pack(index, state)
    )
    assert len(load_index(tar, None)[1]) == count, "the file is believed"
    tracemalloc.start()
    loaded = [load_index(tar, None)[1] for _ in range(100)]
    source = WebDataset([f"{i}.tar" for i in range(100)], [state] * 100, loaded, (), 1)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(source) == 1_000_000
    assert held < 100e6


def mutate(content, rng):
    """Content with a flipped bit, a cut, a block twice or left out, or other digits of a size."""
    data = bytearray(content)
    blocks = len(data) // 512
    kind = rng.randrange(6)
    at = rng.randrange(blocks) * 512
    if kind == 0:
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.randrange(len(data)) :]
    elif kind == 2:
        data[at:at] = data[at : at + 512 * rng.randrange(1, 5)]
    elif kind == 3:
        del data[at : at + 512 * rng.randrange(1, 5)]
    elif kind == 4:
        at = data.index(b'{"i": %d}' % rng.randrange(8))
        data[at + rng.randrange(8)] = rng.randrange(256)
    else:
        headers = [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"]
        header = rng.choice(headers)
        sizes = [b"%011o\0" % rng.getrandbits(rng.randrange(1, 33)), b"-0000000001\0", b"\x80" * 12]
        data[header + 124 : header + 136] = rng.choice([*sizes, b"\xff" * 12, rng.randbytes(12)])
        if rng.randrange(2):
            data[header + 156] = rng.choice(b"0123456789xgLKSDMV\0")
        data[header + 148 : header + 156] = b" " * 8  # the checksum is right
        data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    return bytes(data)


@pytest.mark.filterwarnings("ignore:.*damaged:UserWarning")
def test_mutated_tars_give_samples_corrupt_records_or_user_errors(tmp_path):
    path = tmp_path / "x.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(8):
            key = f"{i:03d}" if i % 4 else "long/" * 30 + str(i)
            writer.write(
                {"__key__": key, "jpg": bytes([i]) * 700, "txt": f"t{i}", "json": {"i": i}}
            )
    content = path.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = dict.fromkeys(("sample", "corrupt", "refused", "damaged"), 0)
    for seed in range(500):
        path.write_bytes(mutate(content, random.Random(seed)))
        try:
            source = open_source(path)
        except UserError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
            continue
        assert isinstance(source, WebDataset)
        outcomes["damaged"] += bool(source.damage)
        assert len(source) <= 12
        for i in range(len(source)):
            try:
                example = source[i]
                assert isinstance(example, Example)
                assert 0 < len(example.image) <= path.stat().st_size
                outcomes["sample"] += 1
            except CorruptRecord as error:
                assert (error.shard, error.index) == (str(path), i)
                outcomes["corrupt"] += 1
    assert all(count > 10 for count in outcomes.values()), outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "KiB"
