"""Files of a source, on the local disk or wherever fsspec reaches (`gs://`, `s3://`, `memory://`).

A path without `://` is local and read without fsspec.
"""

import glob
import os
import re
from pathlib import Path
from typing import NamedTuple

from capjax.errors import UserError

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class FileState(NamedTuple):
    """What tells that a file is another than before: its bytes, and when it was written."""

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
    if match := _BRACES.search(pattern):
        first, last = match[1], match[2]
        numbers = range(int(first), int(last) + 1)
        before, after = pattern[: match.start()], pattern[match.end() :]
        return [path for i in numbers for path in expand(f"{before}{i:0{len(first)}d}{after}")]
    if is_remote(pattern):
        import fsspec

        protocol = pattern.split("://")[0]
        system, path = fsspec.core.url_to_fs(pattern)
        found = [f"{protocol}://{name.lstrip('/')}" for name in system.glob(path)]
    else:
        path = os.path.expanduser(pattern)  # noqa: PTH111 (globs are strings)
        found = [path] if Path(path).is_file() else glob.glob(path)  # noqa: PTH207
        found = [name for name in found if Path(name).is_file()]
    if not found:
        raise UserError(f"no file {pattern!r}: expected a path, or a pattern that some file fits")
    return sorted(found)


def state(path: str) -> FileState:
    """Size and time of the file. Raises `OSError` where it cannot be seen."""
    if not is_remote(path):
        found = os.stat(path)  # noqa: PTH116
        return FileState(found.st_size, str(found.st_mtime_ns))
    import fsspec

    system, inner = fsspec.core.url_to_fs(path)
    info = system.info(inner)
    modified = info.get("ETag") or info.get("mtime") or info.get("updated") or info.get("created")
    return FileState(int(info["size"]), str(modified))


def read_bytes(path: str, start: int = 0, length: int | None = None) -> bytes:
    """The bytes [start, start + length) of the file, or up to its end. Raises `OSError`."""
    if not is_remote(path):
        with open(path, "rb") as file:  # noqa: PTH123
            file.seek(start)
            return file.read() if length is None else file.read(length)
    import fsspec

    system, inner = fsspec.core.url_to_fs(path)
    return system.cat_file(inner, start=start, end=None if length is None else start + length)


def sibling(path: str, name: str) -> str:
    """`name` beside the file `path`, unless `name` is absolute or a URL itself."""
    if is_remote(name) or name.startswith(("/", "~")):
        return os.path.expanduser(name)  # noqa: PTH111
    return f"{path.rpartition('/')[0]}/{name}" if "/" in path else name
