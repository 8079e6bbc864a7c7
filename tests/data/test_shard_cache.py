import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import fsspec
import pytest

from capjax.data import files
from capjax.data.shard_cache import RemoteShard, ShardCache
from capjax.errors import UserError

SIZE = 1000


@pytest.fixture
def remote(tmp_path):
    """`remote("a")` is a file of a thousand bytes in a store, written anew each time."""

    def write(name, data=None):
        path = f"memory://{tmp_path.name}/{name}.array_record"
        data = name.encode() * SIZE if data is None else data
        fsspec.filesystem("memory").pipe(path, data)
        return RemoteShard(path, files.state(path))

    return write


@pytest.fixture
def cache(tmp_path):
    """Room for two of them."""
    return ShardCache(tmp_path / "cache", 2 * SIZE)


def kept(cache):
    """The names of the copies, and of what else there is."""
    return {re.sub(r"^[0-9a-f]{16}-|\.array_record$", "", path.name)
            for path in cache.directory.iterdir()} - {".lock"}  # fmt: skip


def use(cache, *shards):
    """Holds each for a moment, one after another, a second of the clock apart."""
    for shard in shards:
        path = cache.hold(shard).path
        for other in cache.directory.iterdir():
            if other != path:
                fact = other.stat()
                os.utime(other, ns=(fact.st_atime_ns, fact.st_mtime_ns - 10**9))


def test_a_copy_is_made_once_and_is_the_file(cache, remote, monkeypatch):
    shard = remote("a")
    assert cache.hold(shard).path.read_bytes() == b"a" * SIZE
    assert kept(cache) == {"a"}
    monkeypatch.setattr("capjax.data.shard_cache.read_whole", None)
    assert cache.hold(shard).path.read_bytes() == b"a" * SIZE


def test_a_copy_is_made_of_many_requests(cache, remote, monkeypatch):
    monkeypatch.setattr("capjax.data.shard_cache._CHUNK_BYTES", 7)
    data = os.urandom(SIZE)
    assert cache.hold(remote("a", data)).path.read_bytes() == data


def test_what_was_not_used_for_longest_goes(cache, remote):
    a, b, c, d = map(remote, "abcd")
    use(cache, a, b, a, c)
    assert kept(cache) == {"a", "c"}
    use(cache, d)
    assert kept(cache) == {"c", "d"}


def test_what_is_held_stays_and_other_files_are_let_be(cache, remote):
    cache.directory.mkdir()
    (cache.directory / "mine.array_record").write_bytes(bytes(10 * SIZE))
    a, b, c = (cache.hold(remote(name)) for name in "abc")
    again = cache.hold(remote("a"))
    assert kept(cache) == {"a", "b", "c", "mine"}, "over the limit rather than without a shard"
    del a, b
    use(cache, remote("d"))
    assert kept(cache) == {"a", "c", "d", "mine"}
    del c, again
    use(cache, remote("e"))
    assert len(kept(cache)) == 3
    assert {"e", "mine"} < kept(cache)


def test_copies_above_the_limit_go_when_they_are_not_held(cache, remote):
    shards = [remote(name) for name in "abc"]
    held = [cache.hold(shard) for shard in shards]
    assert kept(cache) == {"a", "b", "c"}
    again = cache.hold(shards[0])
    assert kept(cache) == {"a", "b", "c"}, "all are held"
    held.clear()
    assert cache.hold(shards[0]).path == again.path, "a hit, which copies nothing"
    assert len(kept(cache)) == 2
    assert "a" in kept(cache)


def test_a_copy_of_another_size_is_made_anew(cache, remote):
    shard = remote("a")
    held = cache.hold(shard)
    held.path.write_bytes(b"a")
    again = cache.hold(shard)
    assert again.path.read_bytes() == b"a" * SIZE
    cache.discard(held)
    assert again.path.read_bytes() == b"a" * SIZE, "another has its name"
    cache.discard(again)
    assert kept(cache) == set()
    cache.discard(again)


def test_a_file_that_is_another_than_it_was_is_no_copy(cache, remote, failing):
    failing(0, None)  # and no pauses
    before = remote("a")
    remote("a", b"A" * SIZE)
    with pytest.raises(files.WrongFile, match="has changed since it was found"):
        cache.hold(before)
    remote("a", b"short")
    with pytest.raises(files.WrongFile, match="ends before byte 1000"):
        cache.hold(before)
    with pytest.raises(FileNotFoundError):
        cache.hold(before._replace(path=f"{before.path}.no"))
    named = RemoteShard(
        remote("b").path, files.FileState(SIZE, ""), sha256(b"b" * SIZE).hexdigest()
    )
    assert cache.hold(named).path.read_bytes() == b"b" * SIZE
    with pytest.raises(files.WrongFile, match="in its manifest"):
        cache.hold(named._replace(sha256="0" * 64))
    assert kept(cache) == {"b"}, "nothing is left of the others"


def test_what_a_killed_process_left_is_written_over_or_removed(cache, remote):
    a, b, c = map(remote, "abc")
    (copy,) = [cache.hold(a).path]
    copy.rename(f"{copy}.partial")
    assert cache.hold(a).path.read_bytes() == b"a" * SIZE
    assert kept(cache) == {"a"}
    copy.rename(f"{copy}.partial")
    use(cache, b, c)
    assert kept(cache) == {"b", "c"}


def test_a_directory_that_cannot_be_is_refused(remote, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot keep copies .*\?cache=DIRECTORY"):
        ShardCache(tmp_path / "file" / "cache", SIZE).hold(remote("a"))


PROCESS = """
import random, sys
from pathlib import Path
from capjax.data import files
from capjax.data.shard_cache import RemoteShard, ShardCache

cache = ShardCache(Path(sys.argv[1]), int(sys.argv[2]))
shards = [RemoteShard(path, files.state(path)) for path in files.expand(sys.argv[3])]
choose = random.Random(sys.argv[4])
for _ in range(60):
    shard = choose.choice(shards)
    held = cache.hold(shard)
    data = held.path.read_bytes()
    assert data == shard.path[-1].encode() * shard.state.size, shard
"""


def test_processes_share_a_directory(tmp_path):
    (tmp_path / "store").mkdir()
    for name in "abcdef":
        (tmp_path / "store" / name).write_bytes(name.encode() * 10_000)
    arguments = [str(tmp_path / "cache"), "30000", f"file://{tmp_path}/store/*"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *arguments, str(seed)],
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
        )
        for seed in range(4)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    cache = ShardCache(tmp_path / "cache", 30_000)
    assert kept(cache) <= set("abcdef"), "none half made"
    (tmp_path / "store" / "g").write_bytes(bytes(10_000))
    path = f"file://{tmp_path}/store/g"
    cache.hold(RemoteShard(path, files.state(path)))
    assert len(kept(cache)) == 3
