"""Rows of (key, image path, captions, metadata) packed in memory: a million in about 110 MB."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np


class Row(NamedTuple):
    """One image file of a list: `captions` are (source, text) pairs, `image` is the path."""

    key: str
    image: str
    captions: Sequence[tuple[str, str]] = ()
    metadata: Mapping[str, Any] = {}


class Damaged(NamedTuple):
    """A row that cannot be used, and why; it keeps its place and raises when asked for."""

    reason: str


class PackedRows:
    """Rows as msgpack in one buffer; names of captions' sources and of metadata are kept once."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ends = array("q")
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._hashes = array("q")
        self._packer = msgpack.Packer()
        self.num_damaged = 0

    def add(self, row: Row | Damaged) -> None:
        """Packs a row; one that msgpack cannot hold becomes damaged."""
        if isinstance(row, Row):
            try:
                key, image, captions, metadata = row
                captions = self._numbered(captions)
                metadata = self._numbered(metadata.items()) if metadata else ()
                key = None if key == image else key
                self._data += self._packer.pack((image, captions, metadata, key))  # pyrefly: ignore[unsupported-operation]
            except (OverflowError, ValueError, TypeError, RecursionError) as error:
                self._packer = msgpack.Packer()  # what it had begun is still in its buffer
                row = Damaged(_packing_failure(error))
        if isinstance(row, Damaged):
            self.num_damaged += 1
            self._data += self._packer.pack(row.reason.encode("utf-8", "replace").decode())  # pyrefly: ignore[unsupported-operation]
        self._hashes.append(hash(row[0]))
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> Row | Damaged:
        start = self._ends[i - 1] if i else 0
        packed = msgpack.unpackb(memoryview(self._data)[start : self._ends[i]])
        if isinstance(packed, str):
            return Damaged(packed)
        image, captions, metadata, key = packed
        return Row(
            image if key is None else key,
            image,
            [(self._names[captions[k]], captions[k + 1]) for k in range(0, len(captions), 2)],
            {self._names[metadata[k]]: metadata[k + 1] for k in range(0, len(metadata), 2)},
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_data": self._data, "_ends": self._ends, "_names": self._names}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)

    def repeated(self) -> tuple[str, int, int] | None:
        """A key of two rows, and the rows."""
        hashes = np.frombuffer(self._hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        for k in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]):
            first, second = int(order[k]), int(order[k + 1])
            a, b = self[first], self[second]  # hashes agree by chance too
            if isinstance(a, Row) and isinstance(b, Row) and a.key == b.key:
                return a.key, first, second
        return None

    def _numbered(self, pairs: Iterable[tuple[str, Any]]) -> list[Any]:
        """[number of the name, value, ...] of (name, value) pairs."""
        flat = []
        for name, value in pairs:
            number = self._numbers.get(name)
            if number is None:
                name.encode()  # a lone surrogate fails here, like one in a value
                number = self._numbers[name] = len(self._names)
                self._names.append(name)
            flat += (number, value)
        return flat


def _packing_failure(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "its text is not valid UTF-8"
    return f"a value does not fit a record: {error}"
