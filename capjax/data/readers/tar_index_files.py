"""The files that keep indexes of tars: a CRC-32 and a msgpack map of raw columns.

One is made again when its tar has another size, time or mark, and when it is damaged itself.
"""

import hashlib
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgpack
import numpy as np

from capjax.data.files import FileState, is_remote, read_bytes, state, user_cache
from capjax.data.readers.tar import ReadAt
from capjax.data.readers.tar_index import COLUMNS, TarIndex, build_index
from capjax.errors import UserError

_VERSION = 1
_REMOTE_BLOCK_BYTES = 8 << 20


def load_index(path: str, cache: str | None) -> tuple[FileState, TarIndex]:
    """The index of a tar, from its file where that is in date; else made and written.

    The file lies in the directory `cache`, or by default beside a local tar in `.capjax-index`, or
    where that cannot be, in the user's cache. Processes may race: whole files replace one another.
    Raises `UserError` for a tar that cannot be read, or a `cache` that cannot be written.
    """
    try:
        now = state(path)
        for file in _index_files(path, cache):
            if (index := _read(file, now)) is not None:
                return now, index
        with _reader(path, now.size) as read_at:
            index = build_index(path, read_at, now.size)
    except OSError as error:
        raise UserError(f"cannot read the tar {path}: {error}") from error
    content = _pack(index, now)
    for file in _index_files(path, cache):
        try:
            _write(file, content)
            break
        except OSError as error:
            if cache is not None:
                raise UserError(
                    f"cache={cache}: cannot write the index of {path} there ({error.strerror}); "
                    "name another directory"
                ) from error
    return now, index


@contextmanager
def _reader(path: str, total: int) -> Iterator[ReadAt]:
    if not is_remote(path):
        with open(path, "rb") as file:  # noqa: PTH123
            yield lambda start, length: os.pread(file.fileno(), length, start)
        return
    block, begin = b"", 0

    def read_at(start: int, length: int) -> bytes:
        nonlocal block, begin
        if not begin <= start <= start + length <= begin + len(block):
            block = read_bytes(path, start, min(max(length, _REMOTE_BLOCK_BYTES), total - start))
            begin = start
        return block[start - begin : start - begin + length]

    yield read_at


def _index_files(path: str, cache: str | None) -> list[Path]:
    """Where the index of a tar may lie, in the order in which they are tried."""
    where = path if is_remote(path) else os.path.abspath(path)  # noqa: PTH100
    name = where.rpartition("/")[2]
    unique = f"{name}.{hashlib.sha256(where.encode()).hexdigest()[:16]}.index"
    if cache is not None:
        return [Path(cache).expanduser() / unique]
    own = [] if is_remote(path) else [Path(where).parent / ".capjax-index" / f"{name}.index"]
    return [*own, user_cache() / "capjax" / "webdataset" / unique]


def _pack(index: TarIndex, of: FileState) -> bytes:
    columns = {name: getattr(index, name).tobytes() for name in COLUMNS}
    record = {"version": _VERSION, "tar": of, **columns}
    record |= {"extensions": index.extensions, "damage": index.damage}
    body = cast(bytes, msgpack.packb(record))  # None is for packers that write elsewhere
    return struct.pack("<I", zlib.crc32(body)) + body


def _read(file: Path, now: FileState) -> TarIndex | None:
    """The index in a file, or None where there is none that is whole and of the tar as it is."""
    try:
        content = file.read_bytes()
        if content[:4] != struct.pack("<I", zlib.crc32(content[4:])):
            return None
        record = msgpack.unpackb(content[4:])
        if record["version"] != _VERSION or record["tar"] != list(now):
            return None
        columns: dict[str, Any] = {
            name: np.frombuffer(record[name], code) for name, code in COLUMNS.items()
        }
        extensions, damage = tuple(record["extensions"]), record["damage"]
        index = TarIndex(**columns, extensions=extensions, damage=damage)
        return index if _fits(index, now.size) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException):
        return None


def _fits(index: TarIndex, total: int) -> bool:
    """Whether the columns fit one another and the tar: a foreign file may have a sound checksum."""
    counts = len(index.member_ends) == len(index.key_ends), len(index.offset) == len(index.size)
    lasts = index.key_ends[-1:].tolist() + index.member_ends[-1:].tolist()
    return (
        all(counts)
        and len(index.extension) == len(index.size)
        and lasts == [len(index.keys), len(index.size)][: len(lasts)]
        and bool(np.all(index.key_ends[:-1] <= index.key_ends[1:]))
        and bool(np.all(index.member_ends[:-1] < index.member_ends[1:]))
        and bool(np.all(index.extension < len(index.extensions)))
        and bool(np.all((index.offset >= 0) & (index.offset <= total - index.size.astype("q"))))
    )


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
