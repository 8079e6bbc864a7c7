"""Parts of a preparation: fixed ranges of the source, each a shard file with a JSON beside it.

A part is whole once its JSON is there, as that is written last. Its bytes depend on the source
and the settings alone, so a part that was lost or made twice changes nothing.
"""

import base64
import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capjax.data.prepare_example import (
    HASH_BYTES,
    UNREADABLE,
    WISHED,
    Dropped,
    PrepareSettings,
    content_hash,
    prepare_example,
)
from capjax.data.prepare_workers import Stopped
from capjax.data.records import SHARD_SUFFIX, CorruptRecord, encode_example, record_writer
from capjax.data.sources import Source


class Drop(NamedTuple):
    """An example left out: its index in the source, its key ("" where unreadable), and why."""

    index: int
    key: str
    reason: str
    detail: str

    @property
    def is_bad(self) -> bool:
        """Whether the data is damaged, and not merely unwanted."""
        return self.reason not in WISHED


@dataclasses.dataclass(frozen=True)
class Part:
    """What became of the source's examples [start, stop).

    `keys` and `contents` are the hashes uint8 [kept, HASH_BYTES] of the kept ones, in order.
    """

    start: int
    stop: int
    drops: tuple[Drop, ...]
    keys: np.ndarray
    contents: np.ndarray
    num_bytes: int
    num_captions_dropped: int

    @property
    def num_bad(self) -> int:
        """Examples dropped because the data is damaged."""
        return sum(drop.is_bad for drop in self.drops)

    def indices(self) -> np.ndarray:
        """int64 [kept]: where the kept examples stand in the source."""
        dropped = [drop.index - self.start for drop in self.drops]
        return np.delete(np.arange(self.start, self.stop, dtype=np.int64), dropped)


def part_path(directory: Path, start: int) -> Path:
    """The shard file of the part that begins at `start`."""
    return directory / f"{start:012d}{SHARD_SUFFIX}"


def read_part(directory: Path, start: int, stop: int) -> Part | None:
    """The part, or None where it has not been made, or not all of it."""
    try:
        fields = json.loads(part_path(directory, start).with_suffix(".json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    if fields["stop"] != stop:
        return None
    for name in ("keys", "contents"):
        flat = np.frombuffer(base64.b64decode(fields[name]), np.uint8)
        fields[name] = flat.reshape(-1, HASH_BYTES)
    fields["drops"] = tuple(Drop(*drop) for drop in fields["drops"])
    return Part(**fields)


def make_part(
    source: Source,
    settings: PrepareSettings,
    directory: Path,
    start: int,
    stop: int,
    is_stopped: Callable[[], bool],
) -> None:
    """Prepares the examples [start, stop). Raises `Stopped` once `is_stopped`."""
    path = part_path(directory, start)
    drops, keys, contents, captions_dropped = [], [], [], 0
    with atomic(path) as temporary, record_writer(temporary) as write:
        for index in range(start, stop):
            if is_stopped():
                raise Stopped
            found = _prepared(source, index, settings)
            if isinstance(found, Dropped):
                drops.append(Drop(index, *found))
                continue
            record, key, content, dropped = found
            write(record)
            keys.append(content_hash(key))
            contents.append(content)
            captions_dropped += dropped
    fields = {
        "start": start,
        "stop": stop,
        "drops": drops,
        "keys": base64.b64encode(b"".join(keys)).decode(),
        "contents": base64.b64encode(b"".join(contents)).decode(),
        "num_bytes": path.stat().st_size,
        "num_captions_dropped": captions_dropped,
    }
    with atomic(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(fields), "utf-8")


def _prepared(source: Source, index: int, settings: PrepareSettings) -> Any:
    """(record, key, hash of the image, captions dropped) of one example, or `Dropped`."""
    try:
        example = source[index]
    except CorruptRecord as error:
        return Dropped("", UNREADABLE, str(error))
    found = prepare_example(example, settings)
    if isinstance(found, Dropped):
        return found
    try:
        record = encode_example(found.example)
    except ValueError as error:  # a reader let something through that shards cannot hold
        return Dropped(ascii(example.key), UNREADABLE, ascii(str(error)))
    return record, example.key.encode(), found.content, found.num_captions_dropped


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A name to write at; the file becomes `path`, on disk for good, unless an error comes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
