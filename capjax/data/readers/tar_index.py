"""The index of a WebDataset tar: which samples it holds and where their bytes lie, in columns."""

import re
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from capjax.data.readers.tar import DamagedTar, Member, ReadAt, members
from capjax.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "text", "transcript")
_READABLE = {*IMAGES, *TEXTS, "json"}
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
# Type codes of array and NumPy alike: uint8, uint32, int64, in the machine's order of bytes.
COLUMNS = {
    "keys": "B",
    "key_ends": "I",
    "member_ends": "I",
    "extension": "I",
    "offset": "q",
    "size": "I",
}


class TarIndex(NamedTuple):
    """The N samples of one tar and their M members that can be read.

    `keys` uint8: the keys in UTF-8, the i-th ends at `key_ends` [N]; `member_ends` [N]: where the
    i-th sample's members end in the columns `extension` [M] (into `extensions`), `offset` [M] and
    `size` [M] (bytes, 2^32 - 1 for more). `damage`: why the tar is not read to its end, or "".
    """

    keys: np.ndarray
    key_ends: np.ndarray
    member_ends: np.ndarray
    extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    extensions: tuple[str, ...]
    damage: str

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, row: int) -> str:
        """The key of a sample."""
        start = int(self.key_ends[row - 1]) if row else 0
        return bytes(self.keys[start : int(self.key_ends[row])]).decode("utf-8", "replace")

    def _rows(self, first: int, end: int) -> slice:
        start = int(self.member_ends[first - 1]) if first else 0
        return slice(start, int(self.member_ends[end - 1]))

    def members(self, row: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size) of a sample's members, in their order."""
        some = self._rows(row, row + 1)
        names = [self.extensions[code] for code in self.extension[some]]
        spans = zip(self.offset[some].tolist(), self.size[some].tolist(), strict=True)
        return dict(zip(names, spans, strict=True))

    def span(self, first: int, end: int) -> tuple[int, int]:
        """The bytes [start, stop) that hold the samples [first, end)."""
        some = self._rows(first, end)
        offset = self.offset[some]
        return int(offset[0]), int((offset + self.size[some]).max())


def build_index(path: str, read_at: ReadAt, total: int) -> TarIndex:
    """The index of the tar of `total` bytes that `read_at(start, length)` reads.

    Consecutive members of one name up to its basename's first dot are a sample, the rest in lower
    case is the extension (as in webdataset's `group_by_keys`); names in `__…__` are left out, and
    so are samples without an image. A key that comes again gets `#2`, …; a repeated extension
    begins a new sample. Of a damaged tar everything before the damage is indexed, save the sample
    in which it lies. Raises `UserError` where no part of it is a tar.
    """
    columns = {name: array(code) for name, code in COLUMNS.items()}
    extensions: dict[str, int] = {}
    taken: dict[str, int] = {}
    damage = None
    try:
        for key, parts in _samples(members(read_at, total), total):
            columns["keys"].frombytes(_unique(key, taken).encode())
            columns["key_ends"].append(len(columns["keys"]))
            for extension, (offset, size) in parts.items():
                columns["extension"].append(extensions.setdefault(extension, len(extensions)))
                columns["offset"].append(offset)
                columns["size"].append(min(size, 2**32 - 1))
            columns["member_ends"].append(len(columns["size"]))
    except DamagedTar as error:
        damage = error
    if damage is not None and damage.offset == 0:
        packed = read_at(0, 2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")
        mend = "decompress it: random access needs a plain tar" if packed else "write it again"
        raise UserError(f"{path} is no tar that can be read {damage}; {mend}")
    arrays: dict[str, Any] = {name: np.array(c, c.typecode) for name, c in columns.items()}
    return TarIndex(**arrays, extensions=tuple(extensions), damage=str(damage or ""))


def _samples(
    found: Iterator[Member], total: int
) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, extension -> (offset, size)) of each sample that has an image. Raises `DamagedTar`."""
    current, parts = "", {}
    try:
        for member in found:
            match = _NAME.fullmatch(member.name)
            if match is None or _META.match(member.name):
                continue
            key, extension = match[1], match[2].lower()
            if key != current or extension in parts:
                if image_of(parts):
                    yield current, parts
                current, parts = key, {}
            if extension.rpartition(".")[2] in _READABLE:
                parts[extension] = member.offset, member.size
    except DamagedTar as error:
        cut = _NAME.fullmatch(error.cut)
        is_whole = error.offset >= total or (cut is not None and cut[1] != current)
        if is_whole and image_of(parts):
            yield current, parts
        raise
    if image_of(parts):
        yield current, parts


def image_of(extensions: Iterable[str]) -> str | None:
    """Which member is a sample's image: jpg, jpeg, png, webp, else the first `*.jpg`, ….

    webdataset's users ask for "jpg;jpeg;png;webp", and its decoders go by the last part of an
    extension such as `image.jpg`.
    """
    names = list(extensions)
    exact = [name for name in IMAGES if name in names]
    return next(iter([*exact, *(n for n in names if n.rpartition(".")[2] in IMAGES)]), None)


def _unique(key: str, taken: dict[str, int]) -> str:
    """A key that is no path out of a directory, and no other's."""
    plain = "/".join(part for part in key.split("/") if part not in ("", ".", "..")) or "_"
    unique = plain
    while unique in taken:
        taken[plain] += 1
        unique = f"{plain}#{taken[plain]}"
    taken[unique] = 1
    return unique
