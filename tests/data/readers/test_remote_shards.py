import json
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest

from capjax.data import files
from capjax.data.prepare import prepare
from capjax.data.prepare_example import PrepareSettings
from capjax.data.readers.remote_shards import RemoteShards
from capjax.data.records import CorruptRecord, Example, write_shards
from capjax.data.shard_cache import ShardCache
from capjax.data.sources import open_source
from capjax.data.stream import block_example_index
from capjax.errors import UserError

NUM_SHARDS = 7


@pytest.fixture
def prepared(tmp_path):
    """A directory that `prepare` wrote: 189 examples in 7 shards."""
    settings = PrepareSettings(shard_size=30)
    prepare(open_source("emoji:val"), "emoji:val", tmp_path / "prepared", settings)
    return tmp_path / "prepared"


@pytest.fixture
def upload(tmp_path):
    """Copies a directory into a store, without the files of given names; gives its address."""

    def copy(directory, without=()):
        address = f"memory://{tmp_path.name}/{directory.name}"
        for path in directory.iterdir():
            if path.is_file() and path.name not in without:
                fsspec.filesystem("memory").pipe(f"{address}/{path.name}", path.read_bytes())
        return address

    return copy


@pytest.fixture
def copies(monkeypatch):
    """The paths of the shards that were copied, in that order."""
    copied, download = [], ShardCache._download

    def recorded(cache, shard, *arguments):
        copied.append(shard.path)
        return download(cache, shard, *arguments)

    monkeypatch.setattr(ShardCache, "_download", recorded)
    return copied


def small_shards(directory, count, in_each=2):
    examples = [Example(f"{i:04d}", b"image %d" % i) for i in range(count * in_each)]
    write_shards(examples, directory, "train", in_each)
    return directory


@pytest.mark.parametrize("without", [(), ("manifest.json",)])
def test_reads_as_from_the_local_disk_and_copies_what_is_asked_for(
    prepared, upload, copies, tmp_path, without
):
    local = open_source(prepared)
    remote = open_source(f"{upload(prepared, without)}?cache={tmp_path}/cache")
    assert isinstance(remote, RemoteShards)
    assert len(remote) == len(local) == 189
    assert not copies, "opening copies none"
    assert remote[31] == local[31]
    assert remote[59] == local[59]
    assert len(copies) == 1
    assert [remote[i] for i in range(189)] == [local[i] for i in range(189)]
    assert len(copies) == NUM_SHARDS
    assert remote.block_size == 30
    for index in (-1, 189):
        with pytest.raises(IndexError, match="0 <= index < 189"):
            remote[index]


def test_reads_from_s3(prepared, s3, tmp_path):
    for path in prepared.iterdir():
        if path.is_file():
            s3.put_object(Bucket="shards", Key=f"val/{path.name}", Body=path.read_bytes())
    local = open_source(prepared)
    few = range(0, 189, 10)
    for number, names in enumerate(("", "/*-of-*.array_record", "")):
        remote = open_source(f"s3://shards/val{names}?cache={tmp_path}/{number}&cache_gb=1")
        assert [remote[i] for i in few] == [local[i] for i in few]
        if number == 1:
            s3.delete_object(Bucket="shards", Key="val/manifest.json")
    remote = open_source(f"s3://shards/val?cache={tmp_path}/empty")
    first = remote.shards[0].path.removeprefix("s3://shards/")
    content = (prepared / first.removeprefix("val/")).read_bytes()
    s3.put_object(Bucket="shards", Key=first, Body=content[:-1] + b"x")
    with pytest.raises(CorruptRecord, match="has changed since it was found"):
        remote[0]
    assert remote[30] == local[30]


def test_threads_and_pickles_share_the_copies(prepared, upload, copies, tmp_path):
    remote = open_source(f"{upload(prepared)}?cache={tmp_path}/cache")
    again = pickle.loads(pickle.dumps(remote))
    local = open_source(prepared)
    indices = list(range(189)) * 2
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(again.__getitem__, indices)) == [local[i] for i in indices]
        assert list(pool.map(remote.__getitem__, indices)) == [local[i] for i in indices]
    assert len(copies) == NUM_SHARDS


def test_training_copies_each_shard_once_an_epoch(upload, copies, tmp_path):
    address = upload(small_shards(tmp_path / "many", 50))
    size = max(fact.stat().st_size for fact in (tmp_path / "many").iterdir())
    remote = open_source(f"{address}?cache={tmp_path}/cache&cache_gb={18 * size / 1e9}")
    assert remote.block_size == 2
    for epoch in range(2):
        seen = [block_example_index(0, epoch * 100 + i, 100, 2) for i in range(100)]
        assert [remote[i].key for i in seen] == [f"{i:04d}" for i in seen]
        assert sorted(seen) == list(range(100))
        assert len(copies) <= 50 * (epoch + 1)
    assert len(copies) > 70, "it did not all fit"
    kept = [path.stat().st_size for path in (tmp_path / "cache").iterdir()]
    assert sum(kept) <= 18 * size


def test_too_little_room_is_said_or_refused(upload, tmp_path):
    address = upload(small_shards(tmp_path / "many", 20))
    size = max(fact.stat().st_size for fact in (tmp_path / "many").iterdir())
    options = f"?cache={tmp_path}/cache&cache_gb="
    with pytest.warns(UserWarning, match="18 shards together .* again and again; with cache_gb"):
        remote = open_source(f"{address}{options}{3 * size / 1e9}")
    order = np.random.default_rng(0).integers(0, 40, 100).tolist()
    assert [remote[i].key for i in order] == [f"{i:04d}" for i in order], "slow, and right"
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 3 * size
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_source(f"{address}{options}{18 * size / 1e9}")
    with pytest.raises(UserError, match="does not hold two shards"):
        open_source(f"{address}{options}{1.9 * size / 1e9}")
    for value in ("much", "inf", "nan"):
        with pytest.raises(UserError, match=f"cache_gb={value}: expected gigabytes"):
            open_source(f"{address}{options}{value}")


def test_what_is_no_shard_or_not_there_is_refused(prepared, upload, tmp_path):
    first = sorted(path.name for path in prepared.glob("*.array_record"))[0]
    address = upload(prepared, without=(first,))
    with pytest.raises(UserError, match=f"1 of the 7 shards that the manifest .* names .*{first}"):
        open_source(address)
    assert len(open_source(f"{address}/*.array_record")) == 159, "asked for by their names"
    with pytest.raises(UserError, match=r"no shards at memory://.*/nothing"):
        open_source(f"{address}/nothing")
    with pytest.raises(UserError, match=r"expected an address such as s3://"):
        open_source(f"shards:{prepared}")
    content = (prepared / first).read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 100):
        fsspec.filesystem("memory").pipe(f"{address}/torn/0.array_record", content[:size])
        with pytest.raises(UserError, match=r"0.array_record is not a readable ArrayRecord file"):
            open_source(f"{address}/torn")


def test_a_shard_that_is_another_is_copied_once(prepared, upload, copies, tmp_path):
    address = upload(prepared)
    memory = fsspec.filesystem("memory")
    first = sorted(path.name for path in prepared.glob("*.array_record"))[0]
    content = (prepared / first).read_bytes()
    memory.pipe(f"{address}/{first}", content[:-1] + b"x")
    remote = open_source(f"{address}?cache={tmp_path}/cache")
    for index in range(3):
        with pytest.raises(CorruptRecord, match="in its manifest") as caught:
            remote[index]
        assert caught.value.index == index
    assert len(copies) == 1
    memory.pipe(f"{address}/{first}", content)
    assert pickle.loads(pickle.dumps(remote))[0] == open_source(prepared)[0], "only this one knows"


def test_a_shard_that_was_out_of_reach_is_asked_for_again(prepared, upload, failing, tmp_path):
    remote = open_source(f"{upload(prepared)}?cache={tmp_path}/cache")
    failing(4, TimeoutError("late"))
    with pytest.raises(CorruptRecord, match="late"):
        remote[0]
    assert remote[0] == open_source(prepared)[0]


def test_a_damaged_copy_is_made_anew_once(prepared, upload, copies, tmp_path):
    address = f"{upload(prepared)}?cache={tmp_path}/cache"
    local = open_source(prepared)
    assert open_source(address)[0] == local[0]
    (copy,) = (tmp_path / "cache").glob("*.array_record")
    whole = copy.read_bytes()
    for damaged in (whole[:100], bytes(len(whole))):
        copy.write_bytes(damaged)
        assert open_source(address)[0] == local[0]
        assert copy.read_bytes() == whole
    assert len(copies) == 3


def test_a_remote_shard_that_is_none_is_copied_twice_and_given_up(
    prepared, upload, copies, tmp_path
):
    address = upload(prepared, without=("manifest.json",))
    remote = open_source(f"{address}?cache={tmp_path}/cache")
    first = remote.shards[0]
    fsspec.filesystem("memory").pipe(first.path, bytes(first.state.size))
    state = files.state(first.path)
    remote.shards = (first._replace(state=state), *remote.shards[1:])
    for index in range(3):
        with pytest.raises(CorruptRecord, match="not a readable ArrayRecord file"):
            remote[index]
    assert len(copies) == 2


def test_a_foreign_manifest_is_not_believed_and_a_damaged_shard_is_counted(
    prepared, upload, tmp_path
):
    address = upload(prepared)
    memory = fsspec.filesystem("memory")
    content = json.loads((prepared / "manifest.json").read_text())
    content["shards"][0]["sha256"] = "0" * 64
    memory.pipe(f"{address}/manifest.json", json.dumps(content).encode())
    remote = open_source(f"{address}?cache={tmp_path}/cache")
    with pytest.raises(CorruptRecord, match="in its manifest"):
        remote[0]
    assert remote[30] == open_source(prepared)[30]
    for foreign in (b"", b"[]", b'{"shards": 3}', b'{"shards": [{"name": "x"}]}', b"\xff"):
        memory.pipe(f"{address}/manifest.json", foreign)
        assert len(open_source(address)) == 189
