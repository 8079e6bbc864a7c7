"""The files of a checkpoint, and whether they are as they were written."""

import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any

from etils import epath

from capjax.errors import UserError
from capjax.training.workdir import write_atomic

FORMAT_VERSION = 1
METADATA_FILE = "capjax.json"
TOKENIZER_FILE = "tokenizer.model"
STATE = "state"
HASHED_BYTES = 2**20  # larger files under state/ hold array data, which the digests cover

Metadata = dict[str, Any]


class Damage(Exception):  # noqa: N818  (what the files have, not a slip of the program)
    """What is wrong with a checkpoint's files, in one line."""


def walk(directory: epath.Path) -> Iterator[epath.Path]:
    """Every file below `directory`, in the order of their names."""
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from walk(path)
        else:
            yield path


def file_entries(directory: epath.Path) -> dict[str, dict[str, Any]]:
    """Relative path -> its size, and its sha256 unless it holds bulk array data."""
    entries: dict[str, dict[str, Any]] = {}
    for path in walk(directory):
        name, size = str(path.relative_to(directory)), path.stat().length
        entries[name] = {"bytes": size}
        if size <= HASHED_BYTES or not name.startswith(f"{STATE}/"):
            entries[name]["sha256"] = sha256(path.read_bytes())
    return entries


def sha256(content: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_metadata(directory: epath.Path, metadata: Metadata) -> None:
    """Writes `capjax.json` whole or not at all."""
    write_atomic(directory / METADATA_FILE, _render(metadata))


def read_metadata(directory: epath.Path) -> Metadata:
    """The metadata of one step's directory, which is exactly what was written.

    Raises `Damage`, or `UserError` for a format that this version does not read.
    """
    content = _read(directory, METADATA_FILE)
    try:
        metadata = json.loads(content.decode())
        recorded = metadata.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise Damage(f"{METADATA_FILE} is not what was written") from None
    if _render(metadata) != content:
        raise Damage(f"{METADATA_FILE} does not match its hash {recorded:.12}")
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{directory} has checkpoint format {version}, but this capjax reads format "
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
        return (directory / name).read_bytes()
    except FileNotFoundError:
        raise Damage(f"{name} is missing") from None
    except PermissionError:
        raise UserError(f"cannot read {directory / name}: permission denied") from None
    except OSError as error:
        raise Damage(f"{name} cannot be read: {reason(error)}") from error


def file_problems(directory: epath.Path, metadata: Metadata) -> list[str]:
    """Files that are missing, of another size, or (those with a hash) of other content."""
    problems = []
    for name, entry in metadata["files"].items():
        path = directory / name
        size = path.stat().length if path.exists() else None
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


def quiet_orbax() -> None:
    """Keeps the log lines and tracebacks of Orbax off the terminal: capjax reports the errors."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_storage)


def _is_not_storage(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return "/orbax/" not in record.pathname and "OCDBT database" not in str(error)
