"""WebDataset tars, by random access: `webdataset:shards/{00000..00127}.tar?captions=txt`.

Format: https://github.com/webdataset/webdataset ("The WebDataset Format"), and what img2dataset
writes in it. Of each sample an image, texts and JSON are read; nothing is unpickled or extracted,
and no other member is looked at.
"""

import itertools
import json
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, SupportsIndex

import numpy as np

from capjax.data.files import FileState, expand, is_remote, read_whole
from capjax.data.readers.blocks import BlockCache
from capjax.data.readers.tar_index import TEXTS, TarIndex, image_of
from capjax.data.readers.tar_index_files import load_index
from capjax.data.records import Caption, CorruptRecord, Example, checked_index
from capjax.errors import UserError

_MAX_IMAGE_BYTES = 1 << 28
_MAX_TEXT_BYTES = 1 << 24
_BLOCK_BYTES, _MAX_BLOCK_BYTES = 1 << 22, 1 << 26
_MAX_BLOCK = 256  # samples
_CACHE_BYTES = 1 << 28
_OPENERS = 16
_DEFAULT_FIELDS = ("txt", "json.caption", "json.captions")  # the first that there is


def open_webdataset(
    path: str, *, captions: str | None = None, cache: str | None = None, block: str | None = None
) -> "WebDataset":
    """The samples of one tar, of a glob's or of a range's `{00000..00127}`, local or remote.

    `captions`: fields that hold captions, such as `txt,json.caption,json.alt_text`; a JSON field
    may be a string or a list of them; by default `txt`, or for samples without `json.caption` and
    `json.captions`. `cache`: the directory of the index files (see `load_index`). `block`: how many
    neighbouring samples one read of a remote tar takes, unless given about 4 MiB, and 1 for local
    tars; training shuffles blocks of as many (`capjax.data.stream.block_example_index`).
    Warns of damaged tars, of which the whole samples are read. Raises `UserError` for a tar that
    is none, options that say nothing, or no sample with an image.
    """
    paths = expand(path)
    fields = _fields(captions)
    if block is not None and not (block.isdecimal() and 1 <= int(block) <= _MAX_BLOCK):
        raise UserError(f"block={block}: expected a whole number of samples, 1 to {_MAX_BLOCK}")
    with ThreadPoolExecutor(_OPENERS) as pool:
        loaded = list(pool.map(lambda tar: load_index(tar, cache), paths))
    states, indexes = zip(*loaded, strict=True)
    count = sum(map(len, indexes))
    if count == 0:
        damage = next((f"; it is damaged {index.damage}" for index in indexes if index.damage), "")
        raise UserError(f"no sample with an image (jpg, jpeg, png, webp) in {path}{damage}")
    block_size = _block_size(paths, states, count) if block is None else int(block)
    source = WebDataset(paths, states, indexes, fields, block_size)
    if source.damage:
        tar, damage = next(iter(source.damage.items()))
        warnings.warn(
            f"{len(source.damage)} of {len(paths)} tars are damaged and read in part: {tar} "
            f"{damage}",
            stacklevel=3,
        )
    return source


class WebDataset:
    """Random access to the samples of tars, in their order. Made by `open_webdataset`.

    A key is `TAR/KEY`, the tar's path below the directory that all share, without its end, and the
    sample's key in it. Captions carry their field as `source`; the JSON's scalars are the metadata.
    `damage` maps the damaged tars to what ails them. With a `block_size` above 1 the aligned block
    of as many samples around one is read at once and kept for its neighbours, 256 MiB in all.
    """

    def __init__(
        self,
        paths: Sequence[str],
        states: Sequence[FileState],
        indexes: Sequence[TarIndex],
        fields: tuple[str, ...],
        block_size: int,
    ) -> None:
        self.paths = tuple(paths)
        self.fields = fields
        self.block_size = block_size
        self.damage = {
            path: index.damage for path, index in zip(paths, indexes, strict=True) if index.damage
        }
        self.blocks = BlockCache(_CACHE_BYTES)
        self._states = tuple(states)
        self._indexes = tuple(indexes)
        self._names = _names(self.paths)
        self._ends = np.cumsum([len(index) for index in indexes], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: SupportsIndex) -> Example:
        i = checked_index(index, self, "sample")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        row = i - self._start(shard)
        members = self._indexes[shard].members(row)
        image = image_of(members) or ""  # each has one, or it is not in the index
        texts = {"json", *(self.fields or _DEFAULT_FIELDS)}
        wanted = {name: span for name, span in members.items() if name == image or name in texts}
        key = f"{self._names[shard]}/{self._indexes[shard].key(row)}"
        try:
            for name, (_, size) in wanted.items():
                limit = _MAX_IMAGE_BYTES if name == image else _MAX_TEXT_BYTES
                if size > limit or (name == image and not size):
                    raise ValueError(f"its {name} has {size} bytes, expected 1 to {limit}")
            parts = dict(zip(wanted, self._read(shard, row, list(wanted.values())), strict=True))
            return _example(key, parts.pop(image), parts, self.fields)
        except (OSError, ValueError, RecursionError) as error:
            raise CorruptRecord(self.paths[shard], row, str(error)) from error

    def __repr__(self) -> str:
        more = f", +{len(self.paths) - 1} files" if len(self.paths) > 1 else ""
        ails = f"; {len(self.damage)} damaged" if self.damage else ""
        return f"WebDataset({self.paths[0]!r}{more}; {len(self)} examples{ails})"

    def _start(self, shard: int) -> int:
        return int(self._ends[shard - 1]) if shard else 0

    def _read(self, shard: int, row: int, spans: list[tuple[int, int]]) -> list[bytes]:
        """The bytes of members (offset, size) of a sample. Raises `OSError`."""
        path = self.paths[shard]
        if not is_remote(path):
            return _read_local(path, self._states[shard], spans)
        index, start = self._indexes[shard], self._start(shard)
        first = (start + row) // self.block_size * self.block_size - start
        begin, stop = index.span(max(first, 0), min(first + self.block_size, len(index)))
        if stop - begin > _MAX_BLOCK_BYTES:
            return [read_whole(path, offset, offset + size) for offset, size in spans]
        data = self.blocks.read(path, begin, stop)
        return [data[offset - begin : offset - begin + size] for offset, size in spans]


def _read_local(path: str, state: FileState, spans: list[tuple[int, int]]) -> list[bytes]:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        now = os.fstat(file.fileno())
        if FileState(now.st_size, str(now.st_mtime_ns)) != state:
            raise OSError("the tar has changed since it was indexed")
        return [os.pread(file.fileno(), size, offset) for offset, size in spans]


def _fields(captions: str | None) -> tuple[str, ...]:
    fields = () if captions is None else tuple(name.strip() for name in captions.split(","))
    for field in fields:
        if not (field.rpartition(".")[2] in TEXTS or re.fullmatch(r"json(\.[^.]+)+", field)):
            raise UserError(
                f"captions={captions}: {field!r} names no captions; expected fields such as txt or "
                "json.caption, with commas between"
            )
    return fields


def _block_size(paths: Sequence[str], states: Sequence[FileState], count: int) -> int:
    """A power of two of samples in about 4 MiB: a function of the tars alone, as the order is."""
    if not is_remote(paths[0]):
        return 1
    in_block = _BLOCK_BYTES * count // sum(state.size for state in states)
    return 1 << min(max(in_block, 1), _MAX_BLOCK).bit_length() - 1


def _names(paths: Sequence[str]) -> list[str]:
    """What tells the tars apart: their paths below the directory that all share."""
    folders = [path.split("/")[:-1] for path in paths]
    levels = zip(*folders, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
    return ["/".join(path.split("/")[shared:]).removesuffix(".tar") for path in paths]


def _example(key: str, image: bytes, parts: dict[str, bytes], fields: tuple[str, ...]) -> Example:
    """An example of a sample's parts. Raises ValueError for text or JSON that is none."""
    record = json.loads(parts["json"]) if "json" in parts else {}
    if not isinstance(record, dict):
        raise ValueError(f"its json is no object but {record!r:.80}")
    captions: list[Caption] = []
    for field in fields or _DEFAULT_FIELDS:
        texts = [parts[field].decode()] if field in parts else _json_texts(record, field)
        texts = (" ".join(_encodable(text).split()) for text in texts)
        captions += [Caption(text, field) for text in texts if text]
        if captions and not fields:
            break
    return Example(key, image, tuple(captions), metadata=_scalars(record))


def _json_texts(record: dict[str, Any], field: str) -> list[str]:
    """The string, or the strings of the list, at `json.NAME.NAME…`."""
    value: Any = record if field.startswith("json.") else None
    for name in field.split(".")[1:]:
        value = value.get(name) if isinstance(value, dict) else None
    return [item for item in (value if isinstance(value, list) else [value]) if type(item) is str]


def _scalars(record: dict[str, Any]) -> dict[str, Any]:
    """What of a JSON object is plain and fits a record: integers beyond 64 bits become strings."""
    scalars = {}
    for name, value in record.items():
        if type(value) is int and not -(2**63) <= value < 2**64:
            value = str(value)
        if value is None or type(value) in (bool, int, float, str):
            scalars[_encodable(name)] = _encodable(value) if type(value) is str else value
    return scalars


def _encodable(text: str) -> str:
    """JSON may hold halves of surrogate pairs, which no UTF-8 has."""
    return text.encode("utf-8", "replace").decode()
