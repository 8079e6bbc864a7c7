"""The one record every reader yields, and its shards: msgpack inside ArrayRecord files.

ArrayRecord gives random access by index, which is what makes a batch a pure function of its
position. Shards are written with `group_size:1`, one record a chunk: a flipped bit then costs at
most one record, which the checksum of its chunk reports, and reading one record reads no other.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import accumulate, chain, groupby, islice
from operator import index as as_index
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, cast

import msgpack
import numpy as np
from array_record.python import array_record_module

from capjax.errors import UserError

SHARD_SUFFIX = ".array_record"
# Images are compressed already, so compressing again costs time and gains nothing.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# No read-ahead and no thread pool: both serve sequential reading, and random access is ours.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER_BYTES = 1 << 15


class Caption(NamedTuple):
    """A text about an image: where it came from (`source`) and its language (BCP 47)."""

    text: str
    source: str = ""
    language: str = "en"


class Example(NamedTuple):
    """One image and what is said about it.

    `key` is unique and stable within a source; `image` holds the encoded bytes (PNG, JPEG, WebP);
    `boxes` are (left, top, right, bottom) in pixels; `metadata` maps strings to plain values
    (None, bool, int, float, str, bytes, and lists and string-keyed dicts of these).
    """

    key: str
    image: bytes
    captions: tuple[Caption, ...] = ()
    label: int | None = None
    boxes: tuple[tuple[float, float, float, float], ...] | None = None
    metadata: dict[str, Any] = {}  # noqa: RUF012 (never mutated: a record is a value)


_FIELDS = set(Example._fields)
_REQUIRED = {"key", "image"}


class CorruptRecord(Exception):  # noqa: N818 (a state of the data, counted and replaced)
    """A record that cannot be read: `shard` (file), `index` within it, and the `reason`."""

    def __init__(self, shard: str, index: int, reason: str) -> None:
        super().__init__(shard, index, reason)
        self.shard = shard
        self.index = index
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.shard}: record {self.index} cannot be read: {self.reason}"


def _misfit(field: str, expected: str, value: object) -> ValueError:
    return ValueError(f"example field `{field}`: expected {expected}, got {value!r:.80}")


def _check_plain(value: object, field: str) -> None:
    """Refuses what msgpack would change on the way (tuples, sets, arrays, non-string keys)."""
    if value is None or type(value) in (str, int, float, bool, bytes):
        return
    if type(value) is dict:
        for name, item in value.items():
            if type(name) is not str:
                raise _misfit(field, "string keys", name)
            _check_plain(item, f"{field}.{name}")
    elif type(value) is list:
        for item in value:
            _check_plain(item, field)
    else:
        raise _misfit(field, "None, bool, int, float, str, bytes, list or dict", value)


def _validate(example: Example) -> Example:
    key, image, captions, label, boxes, metadata = example
    if type(key) is not str or not key:
        raise _misfit("key", "a non-empty string", key)
    if type(image) is not bytes or not image:
        raise _misfit("image", "non-empty bytes", image)
    if type(captions) is not tuple:
        raise _misfit("captions", "a tuple of Caption", captions)
    for caption in captions:
        if type(caption) is not Caption or not all(type(part) is str for part in caption):
            raise _misfit("captions", "Caption(text, source, language) of strings", caption)
    if label is not None and type(label) is not int:
        raise _misfit("label", "an integer or None", label)
    if boxes is not None and type(boxes) is not tuple:
        raise _misfit("boxes", "a tuple of 4-tuples or None", boxes)
    for box in boxes or ():
        numbers = type(box) is tuple and all(type(side) in (int, float) for side in box)
        if not numbers or len(box) != 4:
            raise _misfit("boxes", "tuples of 4 numbers", box)
    if type(metadata) is not dict:
        raise _misfit("metadata", "a dict", metadata)
    _check_plain(metadata, "metadata")
    return example


def encode_example(example: Example) -> bytes:
    """Encodes an example as msgpack. Raises ValueError naming the field that does not fit.

    A map of the fields, absent where they hold their default. Neighbouring captions of one source
    and language share these: `[source, language, text, text, ...]`.
    """
    record = _validate(example)._asdict()
    groups = groupby(example.captions, key=lambda caption: (caption.source, caption.language))
    record["captions"] = [[*shared, *(caption.text for caption in run)] for shared, run in groups]
    record = {name: value for name, value in record.items() if value not in (None, [], {})}
    try:
        return cast(bytes, msgpack.packb(record))  # None is for packers that write elsewhere
    except (OverflowError, UnicodeEncodeError, RecursionError) as error:
        raise ValueError(f"example {example.key!r:.80} does not fit msgpack: {error}") from error


def decode_example(data: bytes) -> Example:
    """Decodes what `encode_example` wrote. Raises ValueError on anything else."""
    try:
        record = msgpack.unpackb(data)
    except Exception as error:  # msgpack raises a dozen kinds on damaged input
        raise ValueError(f"not a msgpack record: {type(error).__name__}: {error}") from error
    if type(record) is not dict or not _REQUIRED <= record.keys() <= _FIELDS:
        got = list(record) if type(record) is dict else record
        raise _misfit("*", f"key, image and others of {Example._fields}", got)
    captions: list[Caption] = []
    groups = record.get("captions", [])
    if type(groups) is not list:
        raise _misfit("captions", "a list", groups)
    for group in groups:
        if type(group) is not list or len(group) < 3:
            raise _misfit("captions", "lists of source, language and texts", group)
        captions += [Caption(text, group[0], group[1]) for text in group[2:]]
    record["captions"] = tuple(captions)
    boxes = record.get("boxes")
    if type(boxes) is list:
        record["boxes"] = tuple(tuple(box) if type(box) is list else box for box in boxes)
    return _validate(Example(**record))


class ArrayRecordSource:
    """Random access to the examples of one or more ArrayRecord shards, in the order given.

    Threads may share it. It pickles to its paths and counts: a worker process reopens each file
    at first use. Raises UserError for a missing, truncated or foreign file when made, and
    CorruptRecord for a single record that cannot be read.
    """

    def __init__(self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
        one = isinstance(paths, str | os.PathLike)
        self.paths = tuple(os.fspath(path) for path in ([paths] if one else paths))
        if not self.paths:
            raise UserError("no ArrayRecord file given: expected at least one path")
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()
        counts = [self._reader(shard).num_records() for shard in range(len(self.paths))]
        self._ends = np.array(list(accumulate(counts)), np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: SupportsIndex) -> Example:
        i = checked_index(index, self, "record")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        row = i - (int(self._ends[shard - 1]) if shard else 0)
        try:
            # A file that changed since it was counted fails here too, as an index out of bound.
            return decode_example(self._reader(shard).read([row])[0])
        except (RuntimeError, ValueError, IndexError) as error:
            raise CorruptRecord(self.paths[shard], row, str(error)) from error

    def __repr__(self) -> str:
        more = f", +{len(self.paths) - 1} files" if len(self.paths) > 1 else ""
        return f"ArrayRecordSource({self.paths[0]!r}{more}; {len(self)} examples)"

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_ends": self._ends}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state, _readers={}, _lock=threading.Lock())

    def _reader(self, shard: int) -> Any:
        reader = self._readers.get(shard)
        if reader is None:
            with self._lock:
                if shard not in self._readers:
                    self._readers[shard] = open_reader(self.paths[shard])
                reader = self._readers[shard]
        return reader


def open_reader(path: str) -> Any:
    """A reader of an ArrayRecord file. Raises `UserError` where it is none, or not whole."""
    if not Path(path).is_file():
        raise UserError(f"no ArrayRecord file at {path}: expected an existing *{SHARD_SUFFIX} file")
    reader = array_record_module.ArrayRecordReader(
        path, options=_READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER_BYTES
    )
    if reader.ok():
        return reader
    try:
        reader.read([0])  # the only way to hear why
        reason = "unknown reason"
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    raise UserError(
        f"{path} is not a readable ArrayRecord file ({reason}): "
        "it is truncated, damaged or of another format; write or copy it again"
    )


def write_shards(
    examples: Iterable[Example],
    directory: str | os.PathLike[str],
    name: str,
    shard_size: int,
) -> list[Path]:
    """Writes `NAME-00000-of-00003.array_record`, … of `shard_size` examples; returns the paths.

    Shards appear under their final names only when all are complete. The same examples give the
    same bytes. Raises ValueError for no examples or a shard size below 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size: expected at least 1, got {shard_size}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partial: list[Path] = []
    stream = iter(examples)
    try:
        for first in stream:
            partial.append(directory / f".{name}-{len(partial):05d}.{os.getpid()}.partial")
            _write_shard(chain([first], islice(stream, shard_size - 1)), partial[-1])
        if not partial:
            raise ValueError(f"no examples to write for {name!r}")
        total = len(partial)
        paths = [directory / f"{name}-{i:05d}-of-{total:05d}{SHARD_SUFFIX}" for i in range(total)]
        for temporary, path in zip(partial, paths, strict=True):
            temporary.replace(path)
        return paths
    finally:
        for temporary in partial:
            temporary.unlink(missing_ok=True)


def _write_shard(examples: Iterable[Example], path: Path) -> None:
    with record_writer(path) as write:
        for example in examples:
            write(encode_example(example))


@contextlib.contextmanager
def record_writer(path: Path) -> Iterator[Callable[[bytes], object]]:
    """What adds a record to a new ArrayRecord file, which is whole once the block is left.

    Raises `UserError` where it cannot be written, as on a full disk.
    """
    writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)

    def write(record: bytes) -> None:
        with _writing(path):
            writer.write(record)

    try:
        yield write
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the first error is the one to tell of
            writer.close()
        raise
    with _writing(path):
        writer.close()
    open_reader(str(path))  # a full disk or lost connection shows here, not in a later run


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot write {path} ({reason}); free some space, or write elsewhere, and run again"
        ) from error


def checked_index(index: SupportsIndex, source: Sized, what: str = "example") -> int:
    """The index as a number. Raises IndexError, which names the source, where it has none such."""
    i = as_index(index)
    if not 0 <= i < len(source):
        raise IndexError(f"{what} {i} of {source!r}: expected 0 <= index < {len(source)}")
    return i
