"""Copies of remote files on the local disk, up to a number of bytes: those used last stay.

Processes may share a directory. A copy appears under its name only when it is whole; who reads one
holds a shared `flock` on it, and only what nobody holds is removed. A lock ends with its process.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from capjax.data.files import FileState, WrongFile, read_whole, retried, state
from capjax.errors import UserError

_CHUNK_BYTES = 8 << 20  # of one request
_REQUESTS = 8  # at once
_OURS = re.compile(r"[0-9a-f]{16}-")


class RemoteShard(NamedTuple):
    """A remote file as it was when it was found: `sha256` is "" where nothing tells it."""

    path: str
    state: FileState
    sha256: str = ""


class HeldCopy:
    """A copy of a file that stays on the disk as long as this object lives."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self._finalizer = weakref.finalize(self, _release, descriptor)


class ShardCache:
    """The copies in one directory, `limit` bytes together, or as many as are held if that is more.

    Pickles to the directory and the limit.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory = directory
        self.limit = limit

    def hold(self, shard: RemoteShard) -> HeldCopy:
        """The copy of a remote file, made if it is not there; waits where another makes it.

        A copy of another size than the file's is made anew. Raises `OSError` where the remote file
        cannot be read, `WrongFile` where it is another than it was found, and `UserError` where the
        directory cannot be written.
        """
        unique = hashlib.sha256(repr(tuple(shard)).encode()).hexdigest()[:16]
        name = f"{unique}-{shard.path.rpartition('/')[2]}"
        copy, partial = self.directory / name, self.directory / f"{name}.partial"
        while True:
            with self._on_disk():
                self.directory.mkdir(parents=True, exist_ok=True)
                descriptor = _locked(copy, os.O_RDONLY, fcntl.LOCK_SH)
                if descriptor is not None:
                    held = HeldCopy(copy, descriptor)
                    if os.fstat(descriptor).st_size != shard.state.size:
                        self.discard(held)
                        continue
                    with contextlib.suppress(OSError):  # of a directory that can only be read
                        self._make_room()
                    return held
                descriptor = _locked(partial, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if descriptor is None:
                    _wait_for(partial)
                    continue
            try:
                if copy.exists():
                    partial.unlink(missing_ok=True)
                    continue
                with self._on_disk():
                    self._make_room(descriptor, shard.state.size)
                self._download(shard, partial, descriptor)
                with self._on_disk():
                    os.fsync(descriptor)
                    partial.rename(copy)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)

    def discard(self, copy: HeldCopy) -> None:
        """Removes a damaged copy, unless that was done and another has its name.

        Raises `UserError` where the directory cannot be written.
        """
        with self._on_disk(), self._alone(), contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(copy.descriptor), copy.path.stat()):
                copy.path.unlink()

    def _make_room(self, descriptor: int | None = None, size: int = 0) -> None:
        """Removes what was not used for longest; a new file is given its size, which counts."""
        with self._alone():
            if descriptor is not None:
                os.ftruncate(descriptor, 0)  # what a killed process left in it
            facts = _facts(self.directory)
            total = size + sum(fact.st_size for _, fact in facts)
            for path, fact in sorted(facts, key=lambda pair: pair[1].st_mtime_ns):
                if total <= self.limit:
                    break
                if _removed(path):
                    total -= fact.st_size
            if descriptor is not None:
                os.ftruncate(descriptor, size)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else removes copies meanwhile."""
        lock = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _download(self, shard: RemoteShard, partial: Path, descriptor: int) -> None:
        path, (size, _), sha256 = shard

        def copy(start: int) -> None:
            data = read_whole(path, start, min(start + _CHUNK_BYTES, size))
            with self._on_disk():
                if os.pwrite(descriptor, data, start) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with ThreadPoolExecutor(_REQUESTS) as pool:
            for _ in pool.map(copy, range(0, size, _CHUNK_BYTES)):
                pass
        if sha256:
            with partial.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise WrongFile(f"{path} has the sha256 {found}, and {sha256} in its manifest")
        elif retried(lambda: state(path, fresh=True)) != shard.state:
            raise WrongFile(f"{path} has changed since it was found")

    @contextlib.contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot keep copies of remote shards in {self.directory}: "
                f"{error.strerror or error}; name another directory as ?cache=DIRECTORY, or a "
                f"?cache_gb= below {self.limit / 1e9:g}"
            ) from error


def _locked(path: Path, flags: int, kind: int) -> int | None:
    """A descriptor that holds a lock on the file; None where that is gone, or cannot be had."""
    try:
        descriptor = os.open(path, flags, 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, kind)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # noqa: PTH116
            return descriptor
    except (FileNotFoundError, BlockingIOError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _wait_for(partial: Path) -> None:
    """Returns when nobody writes the file. A shared lock: readers of what it became hold such."""
    descriptor = _locked(partial, os.O_RDONLY, fcntl.LOCK_SH)
    if descriptor is not None:
        os.close(descriptor)


def _facts(directory: Path) -> list[tuple[Path, os.stat_result]]:
    """The copies in a directory, those being made too; other files there are not ours to remove."""
    facts = []
    for path in directory.iterdir():
        if _OURS.match(path.name):
            with contextlib.suppress(FileNotFoundError):  # it has just got its name
                facts.append((path, path.stat()))
    return facts


def _removed(path: Path) -> bool:
    """Removes a file unless someone holds it."""
    descriptor = _locked(path, os.O_RDONLY, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if descriptor is None:
        return False
    try:
        path.unlink()
    finally:
        os.close(descriptor)
    return True


def _release(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # of another user, it keeps its time
        os.utime(descriptor)
    os.close(descriptor)
