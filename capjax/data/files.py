"""Files of a source, on the local disk or at a URL (`gs://`, `s3://`, see `capjax.data.urls`).

A path without `://` is local and read without fsspec.
"""

import contextlib
import glob
import io
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from capjax.data.urls import file_system
from capjax.errors import UserError

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_RANGE = 1_000_000
# What the file systems call the mark of a file's content or time, the best first.
_MARKS = ("etag", "md5hash", "content_md5", "mtime", "updated", "lastmodified", "last_modified")
_REQUESTS = 16  # at once, where many files are asked for
_PAUSES = (0.5, 2.0, 8.0)  # seconds before a failed read is tried again
# What a server refuses for good, by the status of HTTP.
_REFUSED: dict[object, type[OSError]] = {
    401: PermissionError,
    403: PermissionError,
    404: FileNotFoundError,
    410: FileNotFoundError,
}

T = TypeVar("T")


class WrongFile(OSError):  # noqa: N818 (a state of the data)
    """A file is another than it was found or described; to read it again does not help."""


class FileState(NamedTuple):
    """What tells that a file is another than before: its bytes, and when it was written.

    `modified` is the time of writing, or a hash of the content where the store has one ("": neither
    is known).
    """

    size: int
    modified: str


def is_remote(path: str) -> bool:
    """Whether the path is a URL."""
    return "://" in path


def expand(pattern: str) -> list[str]:
    """The existing files that a path, a glob or a range such as `{000..127}` names, in order.

    A range names its files in its own order, and each must exist; a glob's are sorted. Raises
    `UserError` where there is none.
    """
    paths = _ranges(pattern)
    if len(paths) == 1:
        return _existing(paths[0])
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return [path for found in pool.map(_existing, paths) for path in found]


def state(path: str, *, fresh: bool = False) -> FileState:
    """Size and mark of the file, those of now if `fresh`: else a listing of before may be believed.

    Raises `OSError` where it cannot be seen.
    """
    if not is_remote(path):
        found = os.stat(path)  # noqa: PTH116
        return FileState(found.st_size, str(found.st_mtime_ns))
    system, inner = file_system(path)
    with _as_os_error(path):
        if fresh:
            system.invalidate_cache()
        info = {name.lower(): value for name, value in system.info(inner).items()}
    if info.get("size") is None:
        raise OSError(f"{path}: the server does not tell its size")
    mark = next((str(info[name]) for name in (*_MARKS, "created") if info.get(name)), "")
    return FileState(int(info["size"]), mark)


def read_bytes(path: str, start: int = 0, length: int | None = None) -> bytes:
    """The bytes [start, start + length) of the file, or up to its end; fewer where it ends before.

    Remote reads are `retried`. Raises `OSError`.
    """
    if not is_remote(path):
        return _read(path, start, length)
    return retried(lambda: _read(path, start, length))


def read_whole(path: str, start: int, stop: int) -> bytes:
    """The bytes [start, stop), read as `read_bytes` does; a remote answer cut short is `retried`.

    Raises `OSError`, where the file ends before `stop` a `WrongFile`.
    """

    def read() -> bytes:
        data = _read(path, start, stop - start)
        if len(data) != stop - start:
            raise WrongFile(f"{path} ends before byte {stop}: it has changed since it was indexed")
        return data

    return retried(read) if is_remote(path) else read()


def _read(path: str, start: int, length: int | None) -> bytes:
    if not is_remote(path):
        with open(path, "rb") as file:  # noqa: PTH123
            file.seek(start)
            return file.read() if length is None else file.read(length)
    if length == 0:
        return b""  # an empty range is the whole file to some servers
    system, inner = file_system(path)
    with _as_os_error(path):
        if length is None:
            return system.cat_file(inner, start=start or None)
        return system.cat_file(inner, start=start, end=start + length)


def retried(read: Callable[[], T]) -> T:
    """What `read` returns, tried a few times, over ten seconds: a network fails for moments.

    A record given up for such a moment would be replaced, and the run another. A file that is not
    there, or that may not be read, is not tried again. Raises `OSError` as `read` does.
    """
    for pause in _PAUSES:
        try:
            return read()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError:
            time.sleep(pause)
    return read()


class RemoteFile(io.RawIOBase):
    """A remote file to read and to seek in, each read one `read_bytes`. Raises `OSError`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._size = retried(lambda: state(path)).size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = read_bytes(self.path, self._at, max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def sibling(path: str, name: str) -> str:
    """`name` beside the file `path`, unless `name` is absolute or a URL itself."""
    if is_remote(name) or name.startswith(("/", "~")):
        return os.path.expanduser(name)  # noqa: PTH111
    return f"{path.rpartition('/')[0]}/{name}" if "/" in path else name


def _ranges(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last = match[1], match[2]
    if not 0 <= int(last) - int(first) < _MAX_RANGE:
        raise UserError(
            f"range {match[0]} of {pattern!r}: expected the last number not below the first, and "
            f"at most {_MAX_RANGE} files"
        )
    before, after = pattern[: match.start()], pattern[match.end() :]
    numbers = range(int(first), int(last) + 1)
    return [path for i in numbers for path in _ranges(f"{before}{i:0{len(first)}d}{after}")]


def _existing(pattern: str) -> list[str]:
    if is_remote(pattern):
        found = _remote_matches(pattern)
    else:
        path = os.path.expanduser(pattern)  # noqa: PTH111 (globs are strings)
        found = [path] if Path(path).is_file() else glob.glob(path, recursive=True)  # noqa: PTH207
        found = [name for name in found if Path(name).is_file()]
    if not found:
        raise UserError(f"no file {pattern!r}: expected a path, or a pattern that some file fits")
    return sorted(found)


def _remote_matches(pattern: str) -> list[str]:
    system, path = file_system(pattern)
    try:
        with _as_os_error(pattern):
            if system.isfile(path):
                return [pattern]
            if not glob.has_magic(path):
                return []
            system.invalidate_cache()  # a listing of before may lack new files
            matches = system.glob(path, detail=True)
    except OSError as error:
        raise UserError(f"cannot look for {pattern!r}: {error}") from error
    protocol, _, given = pattern.partition("://")
    names = [name for name, info in matches.items() if info["type"] == "file"]
    if not given.startswith("/"):  # some systems add a slash
        names = [name.lstrip("/") for name in names]
    return [name if is_remote(name) else f"{protocol}://{name}" for name in names]


@contextlib.contextmanager
def _as_os_error(path: str) -> Iterator[None]:
    """Clients of stores raise errors of their own kinds (no credentials, no connection).

    What a server refuses for good becomes an error that is not `retried`.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        kind = _REFUSED.get(getattr(error, "status", None), OSError)
        raise kind(f"{path}: {type(error).__name__}: {error}") from error


def user_cache() -> Path:
    """The directory for what can be made again, of the user who runs this."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
