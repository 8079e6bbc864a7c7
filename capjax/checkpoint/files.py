"""The files of a checkpoint, and whether they are as they were written."""

import errno
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from capjax.errors import UserError
from capjax.training.storage import (
    file_size,
    is_denied,
    is_directory,
    is_transient,
    listing,
    read_bytes,
    reason,
)
from capjax.training.workdir import write_atomic

FORMAT_VERSION = 1
# How the metadata of a format becomes that of the next: format 2 comes with the entry 1.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
METADATA_FILE = "capjax.json"
TOKENIZER_FILE = "tokenizer.model"
STATE = "state"
HASHED_BYTES = 2**20  # larger files under state/ hold array data, which the digests cover

Metadata = dict[str, Any]


class Damage(Exception):  # noqa: N818  (what the files have, not a slip of the program)
    """What is wrong with a checkpoint's files, in one line."""


def walk(directory: epath.Path) -> Iterator[epath.Path]:
    """Every file below `directory`, in the order of their names."""
    for path in listing(directory):
        if is_directory(path):
            yield from walk(path)
        else:
            yield path


def file_entries(directory: epath.Path) -> dict[str, dict[str, Any]]:
    """Relative path -> its size, and its sha256 unless it holds bulk array data."""
    entries: dict[str, dict[str, Any]] = {}
    for path in walk(directory):
        name, size = str(path.relative_to(directory)), file_size(path)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, f"{path} has vanished")
        entries[name] = {"bytes": size}
        if size <= HASHED_BYTES or not name.startswith(f"{STATE}/"):
            entries[name]["sha256"] = sha256(read_bytes(path))
    if not any(name.startswith(f"{STATE}/") for name in entries):
        raise FileNotFoundError(errno.ENOENT, "the files of the save have vanished")
    return entries


def sha256(content: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_metadata(directory: epath.Path, metadata: Metadata) -> None:
    """Writes `capjax.json` whole or not at all."""
    write_atomic(directory / METADATA_FILE, _render(metadata))


def read_metadata(directory: epath.Path) -> Metadata:
    """The metadata of one step's directory, which is exactly what was written.

    That of an older format is brought up to this one's. Raises `Damage`, or `UserError` for a
    format that this version does not read.
    """
    content = _read(directory, METADATA_FILE)
    try:
        metadata = json.loads(content.decode())
        recorded = metadata.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise Damage(f"{METADATA_FILE} is not what was written") from None
    if _render(metadata) != content:
        raise Damage(f"{METADATA_FILE} does not match its hash {recorded:.12}")
    while metadata.get("format_version") in UPGRADES:
        metadata = UPGRADES[metadata["format_version"]](metadata)
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{directory} has checkpoint format {version}, but this capjax reads formats up to "
            f"{FORMAT_VERSION}; use the version that wrote it: "
            f"{metadata.get('versions', {}).get('capjax', 'unknown')}"
        )
    return metadata


def _render(metadata: Metadata) -> bytes:
    """The exact bytes of `capjax.json`: the metadata and a hash of them."""
    digest = sha256(json.dumps(metadata).encode())
    return (json.dumps({**metadata, "sha256": digest}, indent=1) + "\n").encode()


def _read(directory: epath.Path, name: str) -> bytes:
    try:
        return read_bytes(directory / name)
    except FileNotFoundError:
        raise Damage(f"{name} is missing") from None
    except Exception as error:
        raise unreadable(directory / name, name, error) from error


def unreadable(path: epath.Path, name: str, error: Exception) -> Exception:
    """What to raise for an error of reading: `Damage` only where the storage is not to blame."""
    if is_denied(error):
        return UserError(f"cannot read {path}: permission denied")
    if isinstance(error, UserError) or is_transient(error):
        return error
    return Damage(f"{name} cannot be read: {reason(error)}")


def file_problems(directory: epath.Path, metadata: Metadata) -> list[str]:
    """Files that are missing, of another size, or (those with a hash) of other content."""
    problems = []
    for name, entry in metadata["files"].items():
        try:
            size = file_size(directory / name)
        except Exception as error:
            raise unreadable(directory / name, name, error) from error
        if size is None:
            problems.append(f"{name} is missing")
        elif size != entry["bytes"]:
            problems.append(f"{name} has {size} bytes instead of {entry['bytes']}")
        elif "sha256" in entry and sha256(_read(directory, name)) != entry["sha256"]:
            problems.append(f"{name} does not match its hash")
    return problems


def checked_metadata(directory: epath.Path) -> Metadata:
    """As `read_metadata`, after a check of all files. Raises `Damage` with the first problem."""
    metadata = read_metadata(directory)
    problems = file_problems(directory, metadata)
    if problems:
        raise Damage(first_of(problems))
    return metadata


def first_of(problems: list[str]) -> str:
    """The first of some problems, and how many there are."""
    return problems[0] + (f", and {len(problems) - 1} more" if len(problems) > 1 else "")


def quiet_orbax() -> None:
    """Keeps the log lines and tracebacks of Orbax off the terminal: capjax reports the errors."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_storage)


def _is_not_storage(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return "/orbax/" not in record.pathname and "OCDBT database" not in str(error)
