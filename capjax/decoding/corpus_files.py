"""The directory that a corpus of captions is written to: shards, and the job that they are of.

A shard is a range of the input. It appears whole or not at all, and only after the facts about it;
so what a killed process leaves is whole shards, and leftovers that its successor deletes.
"""

import dataclasses
import errno
import fcntl
import json
import math
import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capjax.checkpoint.files import sha256
from capjax.decoding.corpus import Record, count_records
from capjax.decoding.corpus_records import encode_records
from capjax.decoding.corpus_share import Share
from capjax.decoding.options import DecodingOptions
from capjax.errors import UserError
from capjax.training.workdir import config_changes, write_atomic

MANIFEST = "manifest.json"
JOB = "job.json"
_FACTS = ".shards"
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


class ShardDirectory:
    """An open directory. Other processes may write other shares; the share is this one's until
    `close`, or until the process ends in any way.

    Args:
      path: made if it is not there.
      job: all that a record depends on, as JSON values; with another job's it is refused.
    """

    def __init__(
        self,
        path: Path,
        job: Mapping[str, Any],
        options: DecodingOptions,
        *,
        num_records: int,
        shard_size: int,
        kind: str,
        share: Share = Share(),  # noqa: B008  (immutable)
    ) -> None:
        """Raises `UserError` for a directory of another job or none, or a share that is taken."""
        self.path, self.options, self.kind = path, options, kind
        self.num_records, self.shard_size, self.share = num_records, shard_size, share
        self.num_shards = math.ceil(num_records / shard_size)
        self.job = json.loads(json.dumps(job))
        _check_usable(path)
        try:
            (path / _FACTS).mkdir(parents=True, exist_ok=True)
            self._begin()
            self._lock = _take_lock(path / _FACTS, share)
        except OSError as error:
            raise _unwritable(path, error) from error
        self._clear_leftovers()

    def close(self) -> None:
        """Lets another process have this share."""
        os.close(self._lock)

    def __enter__(self) -> "ShardDirectory":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def own_shards(self) -> range:
        """The numbers of this process's shards."""
        return self.share.of(self.num_shards)

    def missing(self) -> list[int]:
        """Which of them are not there whole."""
        return [number for number in self.own_shards() if self._facts(number) is None]

    def bounds(self, number: int) -> tuple[int, int]:
        """(start, stop) of a shard in the input."""
        start = number * self.shard_size
        return start, min(start + self.shard_size, self.num_records)

    def name(self, number: int) -> str:
        """The shard's file."""
        return f"captions-{number:05d}-of-{self.num_shards:05d}.{self.kind}"

    def write(self, number: int, records: Sequence[Record]) -> None:
        """Writes a shard. Raises `UserError` where the disk is full or otherwise refuses."""
        data = encode_records(records, self.kind, self.options)
        facts = {
            "name": self.name(number),
            "start": self.bounds(number)[0],
            **count_records(records),
            "bytes": len(data),
            "sha256": sha256(data),
        }
        try:
            write_atomic(self._facts_path(number), json.dumps(facts) + "\n")
            write_atomic(self.path / self.name(number), data)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def finish(self) -> dict[str, Any] | None:
        """Writes the manifest and returns it, or None while shards of other processes lack."""
        shards = []
        for number in range(self.num_shards):
            facts = self._facts(number)
            if facts is None:
                return None
            shards.append(facts)
        counts = Counter()
        for facts in shards:
            counts.update({name: facts[name] for name in count_records(())})
        manifest = {**self.job, "counts": dict(counts), "shards": shards}
        try:
            write_atomic(self.path / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        return manifest

    def _facts_path(self, number: int) -> Path:
        return self.path / _FACTS / f"{number:05d}.json"

    def _facts(self, number: int) -> dict[str, Any] | None:
        """What is known of a shard that is there whole, else None."""
        try:
            facts = json.loads(self._facts_path(number).read_text())
            size = (self.path / self.name(number)).stat().st_size
        except (FileNotFoundError, ValueError):
            return None
        return facts if size == facts["bytes"] else None

    def _clear_leftovers(self) -> None:
        """Deletes what killed processes had begun of this share."""
        own = {self.name(number) for number in self.own_shards()}
        own |= {self._facts_path(number).name for number in self.own_shards()}
        if self.share.num_processes == 1:
            own |= {MANIFEST}
        for leftover in (*self.path.glob(".*.tmp"), *(self.path / _FACTS).glob(".*.tmp")):
            if leftover.name[1:].rsplit(".", 2)[0] in own:  # .NAME.PROCESS.tmp
                leftover.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Leaves the job here, or compares it with the one that is here."""
        path = self.path / JOB
        if not path.exists():
            mine = self.path / _FACTS / f"job.{uuid.uuid4().hex}.tmp"
            write_atomic(mine, json.dumps(self.job, indent=1) + "\n")
            try:
                path.hardlink_to(mine)
            except FileExistsError:  # another process was quicker
                pass
            except OSError:  # a file system without links
                mine.replace(path)
            mine.unlink(missing_ok=True)
        try:
            kept = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); choose another --output") from error
        if "options" in kept:  # one that did not exist when the job was begun is as by default
            defaults = json.loads(json.dumps(dataclasses.asdict(DecodingOptions())))
            asked = self.job.get("options", {})
            filled = {name: defaults[name] for name in asked if name in defaults}
            kept["options"] = filled | kept["options"]
        if changes := config_changes(kept, self.job):
            listed = "; ".join(f"{field}: {change}" for field, change in changes.items())
            raise UserError(
                f"--output={self.path} holds captions of another job ({listed}); run it as it was "
                "begun, or choose another --output"
            )


def _check_usable(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"--output={path} is a file; expected a directory, or FILE.jsonl")
    if path.exists() and not (path / JOB).exists():
        others = sorted(each.name for each in path.iterdir() if each.name != _FACTS)
        if others and not (path / JOB).exists():  # another process may have begun meanwhile
            raise UserError(
                f"--output={path} holds other files ({others[0]}); choose a new or empty directory"
            )


def _take_lock(directory: Path, share: Share) -> int:
    """Locks a share for this process, where the file system has locks."""
    name = f"lock-{share.process_id}-of-{share.num_processes}"
    lock = os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return lock
        os.close(lock)
        if not isinstance(error, BlockingIOError):
            raise
        raise UserError(
            f"--output={directory.parent} is being written by another process {share.process_id} "
            f"of {share.num_processes}; wait for it, stop it, or give each a --process_id"
        ) from None
    return lock


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"--output={path}: {error.strerror or error}; mend that and give the same command again, "
        "which goes on from the shards that are there"
    )
