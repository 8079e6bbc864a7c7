"""Storage that fails for a while: what is tried again, for how long, and what comes then.

What cannot be looked at is neither absent nor damaged. An error that may pass by itself (a timeout,
a lost connection, a server's 5xx, EIO) is met by trying again, with pauses that double and are in
part random, so that many processes do not come back at once. After `BUDGET_S` it is a
`StorageError`. What does not pass by itself (nothing there, no permission, no space, read-only) is
raised at once. Only operations that may be done twice are tried again.
"""

import errno
import os
import random
import re
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from etils import epath

from capjax.errors import StorageError, UserError

Result = TypeVar("Result")

BUDGET_S = 60.0  # from the first failure of one operation to giving it up
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0

_PERMANENT = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.EINVAL, errno.EXDEV, errno.ENOSYS, errno.ENOTSUP, errno.EBADF),
}
_HTTP_DENIED = {401, 403}
_HTTP_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
# Of libraries below fsspec, with errors of their own: aiohttp, botocore, google.auth, urllib3.
_LOST_CONNECTIONS = {
    *("ClientConnectionError", "ClientPayloadError", "ConnectionError", "HTTPClientError"),
    *("IncompleteRead", "ProtocolError", "TransportError"),
}
_OS_ERROR = re.compile(r"\[OS error (\d+): ")  # as TensorStore says it
_ABSL_TRANSIENT = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)\b")
_ABSL_DENIED = re.compile(r"\b(PERMISSION_DENIED|UNAUTHENTICATED)\b")


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` is in an object store (`gs://`): no append, no rename, no locks."""
    return "://" in os.fspath(path)


def patiently(
    action: Callable[[], Result],
    doing: str,
    report: Callable[[str], None] | None = None,
) -> Result:
    """The result of `action`, tried again while its errors may pass.

    `doing` is such as "reading X".     `report` (default: `warn`) gets a line for each failure.
    Raises `StorageError` after `BUDGET_S`, and every other error at once.
    """
    pause, give_up_at = FIRST_PAUSE_S, None
    while True:
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            now = time.monotonic()
            give_up_at = give_up_at or now + BUDGET_S
            if now >= give_up_at:
                raise StorageError(
                    f"{doing} failed for {BUDGET_S:g} s ({reason(error)}); run the same command "
                    "again when the storage answers"
                ) from error
            wait = min(pause * random.uniform(0.5, 1.0), max(give_up_at - now, 0.01))
            (report or warn)(f"{doing} failed ({reason(error)}); trying again in {wait:.1f} s")
        time.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def is_transient(error: BaseException) -> bool:
    """Whether the same operation may succeed a while later."""
    if isinstance(error, UserError):
        return False
    if (status := _http_status(error)) is not None:
        return status in _HTTP_TRANSIENT
    if (number := _errno(error)) is not None:
        return number not in _PERMANENT
    if isinstance(error, OSError):
        known = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
        return not isinstance(error, (*known, PermissionError, ValueError))
    if any(kind.__name__ in _LOST_CONNECTIONS for kind in type(error).__mro__):
        return True
    return _ABSL_TRANSIENT.search(str(error)) is not None


def is_denied(error: BaseException) -> bool:
    """Whether the storage is there, and refuses this user."""
    if (status := _http_status(error)) is not None:
        return status in _HTTP_DENIED
    if isinstance(error, PermissionError) or _errno(error) in (errno.EACCES, errno.EPERM):
        return True
    return not isinstance(error, OSError) and _ABSL_DENIED.search(str(error)) is not None


def _http_status(error: BaseException) -> int | None:
    """Of aiohttp (`status`), gcsfs (`code`), requests and botocore (`response`)."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for found in (
        getattr(error, "status", None),
        getattr(error, "code", None),
        getattr(response, "status_code", response),
    ):
        if isinstance(found, (int, str)) and str(found).isdigit():
            return int(found)
    return None


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else None


def exists(path: epath.PathLike) -> bool:
    """Whether there is such a file or directory. Where that cannot be seen it is an error.

    `Path.exists` is False then: to a run, that of its checkpoints or its config would be a new
    beginning over them. Raises as `file_size`.
    """
    return file_size(path) is not None


def file_size(path: epath.PathLike) -> int | None:
    """Bytes of a file (of a directory any number); None where there is none.

    Raises `StorageError`, or `OSError` where it may not be seen.
    """
    try:
        return patiently(lambda: _look(path), f"looking for {path}")[0]
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_directory(path: epath.PathLike) -> bool:
    """Whether there is a directory of that name. Raises as `file_size`."""
    try:
        return patiently(lambda: _look(path), f"looking for {path}")[1]
    except (FileNotFoundError, NotADirectoryError):
        return False


def _look(path: epath.PathLike) -> tuple[int, bool]:
    """(bytes, whether it is a directory)."""
    if is_remote(path):
        found = epath.Path(path).stat()
        return found.length or 0, found.is_directory
    status = Path(path).stat()  # not epath's, which wants a name for the owner
    return status.st_size, stat.S_ISDIR(status.st_mode)


def listing(directory: epath.Path) -> list[epath.Path]:
    """What lies in a directory; nothing where there is no such directory. Raises as `file_size`."""
    try:
        return patiently(lambda: sorted(directory.iterdir()), f"listing {directory}")
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_bytes(path: epath.PathLike) -> bytes:
    """The content of a file. Raises `StorageError`, and `OSError` such as `FileNotFoundError`."""
    return patiently(epath.Path(path).read_bytes, f"reading {path}")


def reason(error: BaseException) -> str:
    """An exception in a few words: storage libraries put pages into theirs."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if "No space left" in text:
        return "no space left on the disk"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = text.strip().splitlines()[0] if text.strip() else ""
    return f"{type(error).__name__}: {first[:160]}" if first else type(error).__name__


def warn(line: str) -> None:
    """Prints one line to stderr."""
    print(f"capjax: warning: {line}", file=sys.stderr, flush=True)
