"""The directory that a preparation writes: whose it is, one process at a time, finished or not."""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from capjax.data.prepare_parts import atomic
from capjax.data.records import CorruptRecord
from capjax.data.sources import Source
from capjax.errors import UserError

MANIFEST = "manifest.json"
WORK = ".prepare"
_PROBES = 16  # examples that tell whether the source is the one of before
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


def probe(source: Source) -> str:
    """A hash over a few examples: a source whose files were exchanged is another source."""
    digest = hashlib.sha256()
    for i in range(min(_PROBES, len(source))):
        try:
            example = source[i * len(source) // min(_PROBES, len(source))]
            digest.update(repr((example.key, example.captions, example.image)).encode())
        except CorruptRecord:
            digest.update(b"unreadable")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What decides which images are found to be whole, and the bytes of those written anew."""
    found = {}
    for name in ("capjax", "pillow", "simplejpeg"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def finished(output: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest where the work is done. Raises `UserError` where it is of other work."""
    path = output / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
        found = {field: manifest[field] for field in ("source", "settings")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not of `capjax data prepare`; choose another output") from error
    _refuse_another({**found, "versions": identity["versions"]}, identity, output)
    for shard in manifest["shards"]:
        shard_path = output / shard["name"]
        if not shard_path.is_file() or shard_path.stat().st_size != shard["bytes"]:
            raise UserError(
                f"{shard_path} is missing or was changed since it was finished; put it back, or "
                f"delete {output} and run again"
            )
    shutil.rmtree(output / WORK, ignore_errors=True)
    return manifest


def _refuse_another(old: Mapping[str, Any], new: Mapping[str, Any], output: Path) -> None:
    changes = [
        f"{field}: {json.dumps(old[part].get(field))} -> {json.dumps(new[part].get(field))}"
        for part in new
        for field in sorted({*old[part], *new[part]})
        if old[part].get(field) != new[part].get(field)
    ]
    if changes:
        raise UserError(
            f"output={output} holds another preparation ({'; '.join(changes)}); "
            "run it with the same source and settings, choose another output, or delete this one"
        )


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Holds the output for this process until it ends in any way; other files are refused."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file; expected a directory, or a path to make one")
    work = output / WORK
    if not work.exists() and output.exists() and any(output.iterdir()):
        raise UserError(f"output={output} holds other files; choose a new or an empty directory")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"output={output}: {error.strerror}; choose another") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            os.close(lock)
            raise UserError(
                f"output={output} is being written by another process; wait for it, stop it, "
                "or choose another output"
            ) from None
    try:
        yield
    finally:
        os.close(lock)


def begin(work: Path, identity: Mapping[str, Any], part_size: int) -> int:
    """Makes the work directory, or checks that it is of the same work; returns its part size."""
    path = work / "settings.json"
    if path.exists():
        old = json.loads(path.read_text("utf-8"))
        _refuse_another(old["identity"], identity, work.parent)
        for leftover in work.glob("*/.*.tmp"):  # of a process that was killed
            leftover.unlink()
        return old["part_size"]
    (work / "parts").mkdir(exist_ok=True)
    (work / "shards").mkdir(exist_ok=True)
    write_json(path, {"identity": identity, "part_size": part_size})
    return part_size


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
