"""Whole files as streams, whole directories as names: on the local disk, or where fsspec goes."""

import contextlib
import gzip
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capjax.data import files
from capjax.data.urls import file_system
from capjax.errors import UserError


@contextlib.contextmanager
def opened(path: str) -> Iterator[io.BufferedReader]:
    """The one file that `path` names, to read bytes from; `.gz` is unpacked on the way.

    Raises `UserError` where there is no such file or it cannot be read to its end.
    """
    found = files.expand(path)
    if len(found) > 1:
        raise UserError(f"{path} names {len(found)} files; expected one here")
    try:
        with _open(found[0]) as file:
            if path.lower().endswith(".gz"):
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield io.BufferedReader(unpacked)
            else:
                yield file
    except (OSError, EOFError) as error:  # EOFError: a gzip file that was cut
        raise UserError(f"cannot read {path}: {error}; give a whole file you may read") from error


def load_json(path: str) -> dict[str, Any]:
    """The JSON object in a file. Raises `UserError` where it is none."""
    with opened(path) as file:
        data = file.read()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; download or write it again") from error
    if type(value) is not dict:
        raise UserError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def listing(directory: str) -> set[str]:
    """Every file below the directory, as paths relative to it; none where it does not exist."""
    if not files.is_remote(directory):
        root = os.path.expanduser(directory)  # noqa: PTH111
        return {
            os.path.relpath(os.path.join(folder, name), root)  # noqa: PTH118 (millions of them)
            for folder, _, names in os.walk(root, followlinks=True)
            for name in names
        }
    system, inner = file_system(directory)
    return {name.removeprefix(inner).lstrip("/") for name in system.find(inner)}


def _open(path: str) -> io.BufferedReader:
    if not files.is_remote(path):
        return Path(path).open("rb")
    system, inner = file_system(path)
    return io.BufferedReader(system.open(inner, "rb"))
