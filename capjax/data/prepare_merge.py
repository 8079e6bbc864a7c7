"""From parts to shards: what repeats what, and the kept examples in the source's order."""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from capjax.data.prepare_example import HASH_BYTES
from capjax.data.prepare_parts import Drop, Part, atomic, part_path
from capjax.data.prepare_workers import Stopped, run_all
from capjax.data.records import SHARD_SUFFIX, decode_example, open_reader, record_writer
from capjax.errors import UserError

_AT_ONCE = 64  # records read together


class Rows(NamedTuple):
    """Records, by the start of their part and their row in it, each int64 [N]."""

    starts: np.ndarray
    rows: np.ndarray


class Duplicate(NamedTuple):
    """A record that repeats another: its part, row and index, the reason, and what it repeats."""

    start: int
    row: int
    index: int
    reason: str
    of_index: int


def choose(parts: Sequence[Part], dedupe: Sequence[str]) -> tuple[Rows, list[Duplicate]]:
    """What stays, in the source's order, and what is left out as a duplicate.

    Of examples with one key the first stays; of what is left, with one image, the first. Memory:
    about 200 bytes an example while it sorts.
    """
    starts = np.concatenate([np.full(len(part.keys), part.start, np.int64) for part in parts])
    rows = np.concatenate([np.arange(len(part.keys), dtype=np.int64) for part in parts])
    indices = np.concatenate([part.indices() for part in parts])
    duplicates = []
    left = np.arange(len(rows))
    for kind, hashes in (
        ("key", np.concatenate([part.keys for part in parts])),
        ("content", np.concatenate([part.contents for part in parts])),
    ):
        if kind not in dedupe:
            continue
        first = left[first_equal(hashes[left])]
        again, of = left[first != left], first[first != left]
        fields = (starts[again], rows[again], indices[again], indices[of])
        duplicates += [
            Duplicate(start, row, index, f"duplicate {kind}", of_index)
            for start, row, index, of_index in zip(*(f.tolist() for f in fields), strict=True)
        ]
        left = left[first == left]
    return Rows(starts[left], rows[left]), duplicates


def name_duplicates(duplicates: Sequence[Duplicate], parts: Path) -> list[Drop]:
    """The duplicates with their keys, which are read from the parts."""
    drops = []
    for start, group in groupby(sorted(duplicates), key=lambda duplicate: duplicate.start):
        with _mending(parts, start):
            reader = open_reader(str(part_path(parts, start)))
            for _, row, index, reason, of_index in group:
                key = decode_example(reader.read([row])[0]).key
                drops.append(Drop(index, key, reason, f"as example {of_index}"))
    return drops


def first_equal(hashes: np.ndarray) -> np.ndarray:
    """uint8 [N, HASH_BYTES] -> int64 [N]: the first row that equals each one, perhaps itself."""
    words = np.ascontiguousarray(hashes).view(np.uint64).reshape(-1, HASH_BYTES // 8)
    order = np.lexsort(words.T)  # stable: of equal ones the first comes first
    ordered = words[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1] if len(order) else 0
    return first


def write_all(
    kept: Rows, shard_size: int, parts: Path, shards: Path, num_workers: int
) -> Iterator[tuple[int, int]]:
    """Writes the shards that `shards` lacks; yields (done, total). Parts go when they are used up.

    Raises `UserError` for a part that the disk has lost: it is made again by the next run.
    """
    total = -(-len(kept.rows) // shard_size)
    pieces = [slice(i * shard_size, (i + 1) * shard_size) for i in range(total)]
    missing = [i for i in range(total) if not shard_path(shards, i).with_suffix(".json").exists()]
    starts = {i: np.unique(kept.starts[pieces[i]]).tolist() for i in missing}
    uses = Counter(start for i in missing for start in starts[i])
    for start in set(np.unique(kept.starts).tolist()) - uses.keys():
        part_path(parts, start).unlink(missing_ok=True)
    tasks = [(i, Rows(kept.starts[pieces[i]], kept.rows[pieces[i]])) for i in missing]
    yield total - len(missing), total
    for done, number in enumerate(run_all(write_shard, (parts, shards), tasks, num_workers), 1):
        uses.subtract(starts[missing[number]])
        for start in starts[missing[number]]:
            if not uses[start]:
                part_path(parts, start).unlink(missing_ok=True)
        yield total - len(missing) + done, total


def shard_path(directory: Path, number: int) -> Path:
    """A finished shard, before it has its name."""
    return directory / f"{number:05d}{SHARD_SUFFIX}"


def write_shard(
    parts: Path, shards: Path, number: int, kept: Rows, is_stopped: Callable[[], bool]
) -> None:
    """Copies the records to a shard, with a JSON of its examples, bytes and sha256 beside it."""
    path = shard_path(shards, number)
    with atomic(path) as temporary, record_writer(temporary) as write:
        for start in np.unique(kept.starts).tolist():
            rows = kept.rows[kept.starts == start].tolist()
            for records in _read(parts, start, rows):
                if is_stopped():
                    raise Stopped
                for record in records:
                    write(record)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {"examples": len(kept.rows), "bytes": path.stat().st_size, "sha256": digest}
    with atomic(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(facts), "utf-8")


def _read(parts: Path, start: int, rows: list[int]) -> Iterator[list[bytes]]:
    with _mending(parts, start):
        reader = open_reader(str(part_path(parts, start)))
    for i in range(0, len(rows), _AT_ONCE):
        with _mending(parts, start):
            records = reader.read(rows[i : i + _AT_ONCE])
        yield records


@contextlib.contextmanager
def _mending(parts: Path, start: int) -> Iterator[None]:
    """A part that cannot be read any more counts as not made, so that the next run makes it."""
    path = part_path(parts, start)
    try:
        yield
    except (UserError, RuntimeError, IndexError, ValueError) as error:
        path.with_suffix(".json").unlink(missing_ok=True)
        raise UserError(
            f"{path} was damaged since it was written; run the same command again to make it anew"
        ) from error
