"""ArrayRecord shards at a remote address: `s3://bucket/prepared?cache_gb=20`.

A shard is copied to the local disk when its first example is asked for (`capjax.data.shard_cache`).
Opening reads the manifest that `capjax data prepare` wrote; for shards without one, the ends of
the files, which tell how many records they hold.
"""

import json
import os
import tempfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from capjax.data import files
from capjax.data.records import (
    SHARD_SUFFIX,
    CorruptRecord,
    Example,
    checked_index,
    decode_example,
    open_reader,
)
from capjax.data.shard_cache import HeldCopy, RemoteShard, ShardCache
from capjax.data.stream import WINDOW_BLOCKS
from capjax.errors import UserError

_CACHE_GB = "20"
_MAX_OPEN = 64
_OPENERS = 16
_TAILS = (1 << 18, 1 << 22, 1 << 26)  # bytes at a shard's end in which its counts are looked for


class _Open(NamedTuple):
    """An open shard: its copy stays while a thread reads from it."""

    copy: HeldCopy
    reader: Any


def open_shards(
    path: str, *, cache: str | None = None, cache_gb: str | None = None
) -> "RemoteShards":
    """The shards at a URL: of one file, a glob, a range `{00000..00127}`, or a directory.

    `cache`: the local directory of the copies, by default the user's cache; `cache_gb`: how many
    gigabytes (1e9 bytes) all copies there may have together, by default 20. Warns where that is
    too little for training. Raises `UserError` for a local path, no shards, ones that are damaged
    or missing, and a cache that does not hold two of them.
    """
    if not files.is_remote(path):
        raise UserError(
            f"shards:{path}: expected an address such as s3://bucket/prepared; shards on a local "
            "disk are opened by their path alone"
        )
    paths = _find(path)
    known = _manifests(path, paths)
    with ThreadPoolExecutor(_OPENERS) as pool:
        found = list(pool.map(lambda shard: known.get(shard) or _look(shard), paths))
    shards, counts = zip(*found, strict=True)
    limit = _bytes_of(_CACHE_GB if cache_gb is None else cache_gb)
    _check_room(path, [shard.state.size for shard in shards], limit)
    directory = Path(cache).expanduser() if cache else files.user_cache() / "capjax" / "shards"
    return RemoteShards(path, shards, counts, ShardCache(directory, limit))


class RemoteShards:
    """Random access to the examples of remote shards, in their order. Made by `open_shards`.

    Threads may share it; it pickles without what is open. `block_size` is a whole shard: an order
    that reads by blocks (`capjax.data.stream.block_example_index`) asks for few shards at a time.
    """

    def __init__(
        self, name: str, shards: Sequence[RemoteShard], counts: Sequence[int], cache: ShardCache
    ) -> None:
        self.name = name
        self.shards = tuple(shards)
        self.cache = cache
        self.block_size = max(1, *counts)
        self._ends = np.cumsum(counts, dtype=np.int64)
        # Half of what is kept may be open here: the rest can go when another shard comes.
        largest = max(shard.state.size for shard in shards)
        self._max_open = max(1, min(_MAX_OPEN, cache.limit // 2 // largest))
        self._forget()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: SupportsIndex) -> Example:
        i = checked_index(index, self, "record")
        number = int(np.searchsorted(self._ends, i, side="right"))
        row = i - (int(self._ends[number - 1]) if number else 0)
        path = self.shards[number].path
        try:
            shard = self._open(number)
        except OSError as error:
            raise CorruptRecord(path, row, f"{type(error).__name__}: {error}") from error
        try:
            return decode_example(shard.reader.read([row])[0])
        except (RuntimeError, ValueError, IndexError) as error:
            raise CorruptRecord(path, row, str(error)) from error

    def __repr__(self) -> str:
        return f"RemoteShards({self.name!r}; {len(self)} examples in {len(self.shards)} shards)"

    def __getstate__(self) -> dict[str, Any]:
        own = ("_opened", "_wrong", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._opened: OrderedDict[int, _Open] = OrderedDict()
        self._wrong: dict[int, str] = {}
        self._lock = threading.Lock()

    def _open(self, number: int) -> _Open:
        """Raises `OSError` where the shard cannot be had.

        One found to be another than it should is not copied again: it raises the same at once.
        """
        with self._lock:
            if number in self._opened:
                self._opened.move_to_end(number)
                return self._opened[number]
            if number in self._wrong:
                raise files.WrongFile(self._wrong[number])
        try:
            opened = self._open_copy(self.shards[number])
        except files.WrongFile as error:
            self._wrong[number] = str(error)
            raise
        with self._lock:
            opened = self._opened.setdefault(number, opened)
            self._opened.move_to_end(number)
            while len(self._opened) > self._max_open:
                self._opened.popitem(last=False)
        return opened

    def _open_copy(self, shard: RemoteShard) -> _Open:
        """A copy that was damaged on the local disk is made anew. Raises `OSError`."""
        copy = self.cache.hold(shard)
        try:
            return _Open(copy, open_reader(str(copy.path)))
        except UserError:
            self.cache.discard(copy)
        copy = self.cache.hold(shard)
        try:
            return _Open(copy, open_reader(str(copy.path)))
        except UserError as error:
            raise files.WrongFile(str(error)) from error


def _find(path: str) -> list[str]:
    pattern = path if path.endswith(SHARD_SUFFIX) else f"{path.rstrip('/')}/*{SHARD_SUFFIX}"
    try:
        return files.expand(pattern)
    except UserError as error:
        raise UserError(
            f"no shards at {path}: {error}; at an address without a layout there must be *"
            f"{SHARD_SUFFIX} files, as `capjax data prepare` writes"
        ) from error


def _manifests(path: str, paths: Sequence[str]) -> dict[str, tuple[RemoteShard, int]]:
    """The shards that manifests beside them describe, with their counts.

    Raises `UserError` where the directory `path` lacks some of its manifest.
    """
    known: dict[str, tuple[RemoteShard, int]] = {}
    for folder in dict.fromkeys(shard.rpartition("/")[0] for shard in paths):
        try:
            described = json.loads(files.read_bytes(f"{folder}/manifest.json"))["shards"]
            for shard in described:
                state = files.FileState(int(shard["bytes"]), "")
                found = RemoteShard(f"{folder}/{shard['name']}", state, str(shard["sha256"]))
                known[found.path] = found, int(shard["examples"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # there is none, or it is of something else
    missing = known.keys() - set(paths)
    if missing and not path.endswith(SHARD_SUFFIX):
        raise UserError(
            f"{len(missing)} of the {len(known)} shards that the manifest at {path} names are not "
            f"there, {min(missing)} among them; copy them there, or name the shards to be read"
        )
    return known


def _look(path: str) -> tuple[RemoteShard, int]:
    """The shard with its count. Raises `UserError` where it cannot be read."""
    try:
        state = files.state(path)
        return RemoteShard(path, state), _count(path, state.size)
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error}") from error


def _count(path: str, size: int) -> int:
    """How many records a shard has, from its end: ArrayRecord keeps an index there.

    The reader reads files only, so the end is given to it in a file that is a hole before.
    """
    for tail in _TAILS:
        with tempfile.NamedTemporaryFile() as file:
            start = max(0, size - tail)
            os.truncate(file.name, size)
            file.seek(start)
            file.write(files.read_bytes(path, start))
            file.flush()
            try:
                return open_reader(file.name).num_records()
            except UserError:
                if start == 0:
                    break
    raise UserError(
        f"{path} is not a readable ArrayRecord file: it is truncated, damaged or of another "
        "format; write or copy it again"
    )


def _bytes_of(cache_gb: str) -> int:
    try:
        return int(float(cache_gb) * 1e9)
    except (ValueError, OverflowError) as error:  # no number, or one that has no end
        raise UserError(f"cache_gb={cache_gb}: expected gigabytes, such as {_CACHE_GB}") from error


def _check_room(path: str, sizes: Sequence[int], limit: int) -> None:
    largest = max(sizes)
    if limit < min(sum(sizes), 2 * largest):
        raise UserError(
            f"cache_gb={limit / 1e9:g} does not hold two shards of {path}, the largest of which "
            f"has {largest / 1e9:.2g} GB; give it more, or prepare with a smaller --shard_size"
        )
    at_once = min(sum(sizes), (WINDOW_BLOCKS + 2) * largest)
    if limit < at_once:
        warnings.warn(
            f"cache_gb={limit / 1e9:g} is little for {path}: training shuffles {WINDOW_BLOCKS + 2} "
            f"shards together and would copy them again and again; with cache_gb="
            f"{at_once / 1e9:.2g} each comes once an epoch",
            stacklevel=3,
        )
