"""Where examples come from: the embedded emoji corpus, a folder of images, ArrayRecord shards."""

import difflib
import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np

from capjax.data.layouts import open_address, parse_address
from capjax.data.records import (
    SHARD_SUFFIX,
    ArrayRecordSource,
    Caption,
    CorruptRecord,
    Example,
    checked_index,
)
from capjax.data.vague import WithVague, vague_fraction
from capjax.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
EMOJI_DIRECTORY = Path(__file__).parent / "emoji"
# The styles each split of the embedded corpus is drawn in (capjax/data/emoji/README.md).
EMOJI_SPLITS = {
    "train": ("fluent", "noto"),
    "val": ("fluent", "noto"),
    "composition": ("fluent", "noto"),
    "concept": ("fluent", "noto"),
    "style": ("twemoji",),
}
SOURCE_NAMES = tuple(f"emoji:{split}" for split in EMOJI_SPLITS)


@runtime_checkable
class Source(Protocol):
    """Random access to examples. Picklable, and safe to read from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex, /) -> Example: ...


def block_size(source: Source) -> int:
    """How many neighbouring examples of a source are read at once: 1 unless it says otherwise."""
    return getattr(source, "block_size", 1)


def open_source(
    name: str | os.PathLike[str],
    *,
    styles: Sequence[str] | None = None,
    flags: bool = True,
) -> Source:
    """Opens a source of examples by name or path.

    `emoji:SPLIT` is a split of the embedded corpus (`SOURCE_NAMES`): `styles` keeps some of its
    styles, and `flags=False` drops the flags (in `train` and `style`). `emoji:SPLIT?vague=0.7` adds
    a caption without attributes that are left out at random (`WithVague`).
    `LAYOUT:PATH?OPTION=VALUE` is opened by a reader of `capjax.data.layouts`. A directory or glob
    of `*.array_record` files is read in the order of their names. Any other directory is searched
    for images, see `ImageDirectory`; so is a single image file. Raises UserError if there is
    nothing to read there.
    """
    name = os.fspath(name)
    split, _, query = name.partition("?")
    if split in SOURCE_NAMES:
        source = _open_emoji(split, styles, flags)
        return WithVague(source, vague_fraction(name, query)) if query else source
    if (address := parse_address(name)) and styles is None and flags:
        return open_address(address)
    if (styles is not None or not flags) and not name.startswith("emoji:"):
        raise UserError(f"source {name!r} has no `styles` or `flags`: only emoji:SPLIT does")
    path = Path(name).expanduser()
    if name and path.is_dir():  # an empty name would mean the current directory
        shards = sorted(path.glob(f"*{SHARD_SUFFIX}"))
        return ArrayRecordSource(shards) if shards else ImageDirectory(path)
    if path.is_file():
        if path.suffix == SHARD_SUFFIX:
            return ArrayRecordSource(path)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return ImageDirectory(path.parent, (path.name,))
        raise UserError(
            f"source {name!r}: expected an image ({' '.join(IMAGE_SUFFIXES)}) or a "
            f"*{SHARD_SUFFIX} file; give the directory of the images or one such file"
        )
    if glob.has_magic(name) and (matches := sorted(glob.glob(str(path)))):  # noqa: PTH207
        return ArrayRecordSource(matches)
    close = difflib.get_close_matches(name, SOURCE_NAMES, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(
        f"no source {name!r}: expected one of {', '.join(SOURCE_NAMES)}, or the path of an "
        f"existing directory of images or of *{SHARD_SUFFIX} files{hint}"
    )


def _open_emoji(name: str, styles: Sequence[str] | None, flags: bool) -> Source:
    split = name.removeprefix("emoji:")
    valid = EMOJI_SPLITS[split]
    chosen = valid if styles is None else (styles,) if isinstance(styles, str) else tuple(styles)
    if not chosen or not set(chosen) <= set(valid):
        raise UserError(f"styles={styles!r} of {name!r}: expected some of {', '.join(valid)}")
    shards = sorted(EMOJI_DIRECTORY.glob(f"{split}-*-of-*{SHARD_SUFFIX}"))
    if not shards:
        raise UserError(
            f"source {name!r}: no shards in {EMOJI_DIRECTORY}; "
            "install capjax again or run tools/build_emoji_corpus.py"
        )
    source = ArrayRecordSource(shards)
    if flags and set(chosen) == set(valid):
        return source
    metadata = (source[i].metadata for i in range(len(source)))
    return Subset(
        source,
        [
            i
            for i, of in enumerate(metadata)
            if of["style"] in chosen and (flags or of["group"] != "Flags")
        ],
    )


class Subset:
    """The examples of a source at the given indices, in their order."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: SupportsIndex) -> Example:
        i = checked_index(index, self)
        return self.source[int(self.indices[i])]

    def __repr__(self) -> str:
        return f"Subset({self.source!r}; {len(self)} examples)"


class ImageDirectory:
    """The image files below a directory, in the order of their relative paths, which are the keys.

    A file of the same name ending in `.txt` holds the caption. An object in one ending in `.json`,
    as img2dataset writes, holds a `caption` too, and metadata. Names starting with a dot are
    skipped; links to directories are followed once. `files` fixes the relative paths instead of
    searching. A file that has become unreadable raises CorruptRecord when it is asked for; whether
    the bytes are a sound image shows when they are decoded.
    """

    def __init__(
        self, directory: str | os.PathLike[str], files: Sequence[str] | None = None
    ) -> None:
        self.directory = os.fspath(directory)
        self.keys = tuple(_find_images(self.directory) if files is None else files)
        if not self.keys:
            raise UserError(
                f"no images in {self.directory}: expected files ending in "
                f"{', '.join(IMAGE_SUFFIXES)}, at any depth{_other_files(self.directory)}"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: SupportsIndex) -> Example:
        i = checked_index(index, self, "image")
        path = Path(self.directory, self.keys[i])
        try:
            image = path.read_bytes()
            sidecar = path.with_suffix(".txt")
            texts = [sidecar.read_text("utf-8")] if sidecar.is_file() else []
            metadata = _json_beside(path)
        except (OSError, ValueError, RecursionError) as error:
            raise CorruptRecord(str(path), i, str(error)) from error
        if not image:
            raise CorruptRecord(str(path), i, "the file is empty")
        if isinstance(metadata.get("caption"), str):
            texts.append(metadata.pop("caption"))
        # Lines are joined: the file is one caption, however it is wrapped. img2dataset writes the
        # same caption into both files.
        different = dict.fromkeys(" ".join(text.split()) for text in texts)
        captions = tuple(Caption(text, source="sidecar") for text in different if text)
        return Example(self.keys[i], image, captions, metadata=metadata)

    def __repr__(self) -> str:
        return f"ImageDirectory({self.directory!r}; {len(self)} images)"


def _other_files(directory: str) -> str:
    """Where a directory holds a data set of another layout, the address that opens it."""
    for suffix in (".tar", ".parquet"):
        if any(Path(directory).glob(f"*{suffix}")):
            return f"; its {suffix} files are {f'{directory}/*{suffix}'!r}"
    return ""


def _json_beside(image: Path) -> dict[str, Any]:
    """The object in the `.json` file of the image's name; empty where there is none."""
    sidecar = image.with_suffix(".json")
    if not sidecar.is_file():
        return {}
    fields = json.loads(sidecar.read_text("utf-8"))
    if type(fields) is not dict:
        return {}
    json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair fails here, not later
    return fields


def _find_images(directory: str) -> list[str]:
    def refuse(error: OSError) -> None:
        raise UserError(
            f"cannot read the directory {error.filename}: {error.strerror}; "
            "give one that you may list"
        )

    seen: set[str] = set()
    keys: list[str] = []
    for folder, folders, files in os.walk(directory, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        keys += [
            Path(folder, name).relative_to(directory).as_posix()
            for name in files
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)
        ]
    return sorted(keys)
