"""The members of a tar archive and where their bytes lie: headers are read, data is passed over.

Formats: POSIX.1-1988 ustar, POSIX.1-2001 pax (`path` and `size` records) and GNU (long names,
base-256 sizes), see the manual of GNU tar, "Basic Tar Format". Nothing is extracted.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
_REGULAR = b"07\0"
_MAX_NAME_BYTES = 1 << 20  # of a long name or of pax records: more is no name
# Of these the header stands alone, whatever size it gives (hard and symbolic links, devices, …).
_WITHOUT_DATA = b"123456"

ReadAt = Callable[[int, int], bytes]


class Member(NamedTuple):
    """A regular file of an archive: its data is the bytes [offset, offset + size)."""

    name: str
    offset: int
    size: int


class DamagedTar(Exception):  # noqa: N818 (a state of the data)
    """The archive cannot be read from the byte `offset` on; what came before it is sound.

    `cut` is the name of the file that the archive ends within, where that is the reason.
    """

    def __init__(self, offset: int, reason: str, cut: str = "") -> None:
        super().__init__(offset, reason, cut)
        self.offset = offset
        self.reason = reason
        self.cut = cut

    def __str__(self) -> str:
        return f"from byte {self.offset} on: {self.reason}"


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: int
    offset: int  # of its data


def members(read_at: ReadAt, total: int) -> Iterator[Member]:
    """The regular files of the archive of `total` bytes that `read_at(start, length)` reads.

    Links, directories and devices are passed over. Names are not changed but for bytes that are no
    UTF-8. Memory is bounded: no size is believed that the archive's own does not allow. Raises
    `DamagedTar` at the first header that is none, or at data that the archive ends within.
    """
    position = 0
    extended: dict[str, bytes] = {}  # what the next header is to be read with
    shared: dict[str, bytes] = {}  # what all that follow are
    while (header := _header(read_at, position, total)) is not None:
        fields = {**shared, **extended}
        size = header.size if header.kind in b"xgLK" else _pax_size(fields, header.size, position)
        stored = 0 if header.kind in _WITHOUT_DATA else size
        name = fields.get("path", header.name).decode("utf-8", "replace")
        if header.offset + stored > total:
            cut = "" if header.kind in b"xgLK" else name
            raise DamagedTar(position, f"the archive ends within {name!r:.80}", cut)
        if header.kind in b"xgLK":
            if size > _MAX_NAME_BYTES:
                raise DamagedTar(position, f"a name of {size} bytes")
            data = read_at(header.offset, size)
            if header.kind == ord("L"):
                extended["path"] = data.split(b"\0")[0]
            elif header.kind != ord("K"):
                (extended if header.kind == ord("x") else shared).update(_pax(data, position))
        else:
            if header.kind in _REGULAR:
                yield Member(name, header.offset, size)
            extended = {}
        position = header.offset + -(-stored // BLOCK) * BLOCK


def _header(read_at: ReadAt, position: int, total: int) -> _Header | None:
    """The header at a position; None for the zeros that end an archive."""
    block = read_at(position, BLOCK) if position < total else b""
    if len(block) < BLOCK:
        raise DamagedTar(position, "the archive has no end mark")
    if not any(block):
        return None
    stated = _number(block[148:156], position)
    rest = block[:148] + block[156:]
    unsigned = sum(rest) + 8 * ord(" ")
    # Some old writers added up signed bytes.
    if stated != unsigned and stated != unsigned - 256 * sum(byte > 127 for byte in rest):
        raise DamagedTar(position, "no tar header (its checksum differs)")
    name = block[:100].split(b"\0")[0]
    kind = block[156]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0")[0]):
        name = prefix + b"/" + name
    if kind in b"\0" and name.endswith(b"/"):  # a directory, before POSIX
        kind = ord("5")
    return _Header(name, _number(block[124:136], position), kind, position + BLOCK)


def _number(field: bytes, position: int) -> int:
    """An octal number, or GNU's: big-endian behind the byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip() or b"0"
    if digits.strip(b"01234567"):  # int() would take signs and underscores
        raise DamagedTar(position, f"no tar header ({field!r} is no number)")
    return int(digits, 8)


def _pax(data: bytes, position: int) -> dict[str, bytes]:
    """The pax records `LENGTH KEY=VALUE\\n` that name a file or give its size."""
    found = {}
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 10)
        length = data[at:space] if space > at else b""
        end = at + int(length) if length.isdigit() else at
        key, equals, value = data[space + 1 : max(end - 1, 0)].partition(b"=")
        if end <= space or not equals or data[end - 1 : end] != b"\n":
            raise DamagedTar(position, "pax records that are none")
        if key in (b"path", b"size"):
            found[key.decode()] = value
        at = end
    return found


def _pax_size(fields: dict[str, bytes], size: int, position: int) -> int:
    value = fields.get("size")
    if value is None:
        return size
    if not value.isdigit() or len(value) > 19:
        raise DamagedTar(position, f"a size of {value!r:.40}")
    return int(value)
