"""One source for every layout that lists image files: packed rows in memory, images on disk.

A layout's reader is a generator of `Row`s; `indexed_files` packs them, refuses keys that occur
twice, and finds the directory of the images.
"""

import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import SupportsIndex

from capjax.data import files
from capjax.data.readers.packed_rows import Damaged, PackedRows, Row
from capjax.data.readers.streams import listing
from capjax.data.records import Caption, CorruptRecord, Example, checked_index
from capjax.errors import UserError

_LOOKED_UP = 16  # images that are looked for when a source is opened
_LOOKED_UP_REMOTELY = 4


class IndexedFiles:
    """Images that a list names. Threads may share it; it pickles with its packed rows.

    A damaged row, and an image that cannot be read, raise CorruptRecord when asked for.
    """

    def __init__(self, title: str, path: str, images: str, rows: PackedRows) -> None:
        self.title = title
        self.path = path
        self.images = images
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Example:
        i = checked_index(index, self, "row")
        row = self._rows[i]
        if isinstance(row, Damaged):
            raise CorruptRecord(self.path, i, row.reason)
        image = read_image(image_path(self.images, row.image), i)
        captions = tuple(Caption(text, source) for source, text in row.captions)
        return Example(row.key, image, captions, metadata=dict(row.metadata))

    def __repr__(self) -> str:
        return self.title


def indexed_files(
    layout: str,
    path: str,
    rows: Iterable[Row | Damaged],
    images: Sequence[str],
    counts: Counter[str] | None = None,
) -> IndexedFiles:
    """The source of the rows of a list at `path`.

    `images`: directories that may hold the images; the first that does is taken. `counts`: what
    the rows leave out, filled as they are drawn, for the repr. Raises `UserError` for no usable
    row, a key that occurs twice, an image path that leaves the directory by `..`, and where none
    of the images looked up is in any of the directories.
    """
    packed, num_captions = PackedRows(), 0
    for row in rows:
        if isinstance(row, Row):
            if ".." in row.image:
                refuse_escape(row.image, f"{layout} {path}, row {len(packed)}")
            num_captions += len(row.captions)
        packed.add(row)
    counts = Counter({"damaged rows": packed.num_damaged}) + (counts or Counter())
    good = _good_rows(packed)
    if not good:
        example = f"; the first: {packed[0][0]}" if len(packed) else ""
        raise UserError(
            f"{layout} {path}: no usable row among {len(packed)}{example}; "
            f"expected rows that name an image{_counted(counts)}"
        )
    if found := packed.repeated():
        key, first, second = found
        raise UserError(
            f"{layout} {path}: the key {key!r} is that of row {first} and of row {second}; "
            "keys must be unique: drop one of the rows, or name another key"
        )
    directory = _directory_with(layout, path, [row.image for row in good], images)
    title = f"{layout}({path!r}; {len(packed)} images, {num_captions} captions"
    return IndexedFiles(f"{title}{_counted(counts)})", path, directory, packed)


def image_path(directory: str, image: str) -> str:
    """Where an image is: the path itself if absolute or a URL, else below the directory."""
    return image if _is_absolute(image) else posixpath.join(directory, image)


def refuse_escape(image: str, where: str) -> None:
    """Raises `UserError` for a relative path that leads out of its directory."""
    if not _is_absolute(image) and posixpath.normpath(image).split("/")[0] == "..":
        raise UserError(
            f"{where}: the image path {image!r} leaves the directory of the images; "
            "give a directory that holds them all as ?images=DIRECTORY and paths within it"
        )


def read_image(path: str, index: int) -> bytes:
    """The bytes of an image file. Raises `CorruptRecord` where there are none."""
    try:
        # A list may name a device or a pipe, which would be read without end.
        if not files.is_remote(path) and Path(path).exists() and not Path(path).is_file():
            raise OSError("not a regular file")
        image = files.read_bytes(path)
    except (OSError, ValueError, UserError) as error:  # ValueError: a path with a NUL
        raise CorruptRecord(path, index, f"{type(error).__name__}: {error}") from error
    if not image:
        raise CorruptRecord(path, index, "the file is empty")
    return image


def beside(path: str, *names: str) -> list[str]:
    """Directories for `names` seen from the list at `path`: beside it, then one level up."""
    path = files.sibling("", path) if path.startswith("~") else path
    folder = path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")
    above = folder.rpartition("/")[0] if files.is_remote(path) else f"{folder}/.."
    return [posixpath.join(place, name) for name in names for place in (folder, above)]


def given_images(path: str, images: str) -> list[str]:
    """Where the option `images` may lead: seen from the list, from above it, from here."""
    if _is_absolute(images) or images.startswith("~"):
        return [files.sibling(path, images)]
    return [*beside(path, images), images]


def present(directories: Sequence[str]) -> tuple[str, set[str]]:
    """The first of the directories that holds files, and their relative paths (else none)."""
    for directory in directories:
        if names := listing(directory):
            return directory, names
    return directories[0], set()


def _is_absolute(path: str) -> bool:
    return path.startswith("/") or files.is_remote(path)


def _counted(counts: Counter[str]) -> str:
    return "".join(f", {number} {what}" for what, number in counts.items())


def _good_rows(packed: PackedRows) -> list[Row]:
    """Some rows, evenly spread, that name an image; the first of all where those do not."""
    spread = (packed[i] for i in range(0, len(packed), max(1, len(packed) // _LOOKED_UP)))
    if good := [row for row in spread if isinstance(row, Row)]:
        return good
    rest = (packed[i] for i in range(len(packed)))
    return next(([row] for row in rest if isinstance(row, Row)), [])


def _directory_with(layout: str, path: str, names: list[str], directories: Sequence[str]) -> str:
    failure: UserError | None = None
    for directory in directories:
        paths = [image_path(directory, name) for name in names]
        if any(files.is_remote(path) for path in paths):
            paths = paths[:: -(-len(paths) // _LOOKED_UP_REMOTELY)]
        for image in paths:
            try:
                files.state(image)
            except (OSError, ValueError):  # ValueError: a path with a NUL
                continue
            except UserError as error:  # no client for such a URL: said if no other image is there
                failure = error
                continue
            return directory
    raise failure or UserError(
        f"{layout} {path}: none of the {len(names)} images looked up is there, such as "
        f"{names[0]!r} in {', '.join(directories)}; give their directory as ?images=DIRECTORY"
    )
