"""The records of a range of a corpus: read ahead, captioned, filtered, duplicates captioned once.

A range depends on nothing outside it: its batches are its own, and the draws depend on the index of
an image in the whole input. So ranges may be made again, in any order, by any process.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from capjax.data.decode import ImageError
from capjax.data.sources import Source
from capjax.decoding.inputs import example_reader
from capjax.errors import UserError

Record = dict[str, Any]
_OF_THE_IMAGE = ("index", "key", "references")  # what a duplicate has of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filters:
    """What marks a caption: None lets everything pass.

    Attributes:
      min_logprob: the least log-probability a token, its mean over `num_tokens`.
      min_tokens: the fewest tokens, the end and the prefix included.
      max_tokens: the most tokens, likewise.
    """

    min_logprob: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None

    def __post_init__(self):
        low, high = self.min_tokens, self.max_tokens
        if low is not None and high is not None and low > high:
            raise UserError(f"min_tokens={low} is above max_tokens={high}: nothing would be left")

    def failed(self, caption: Record) -> str | None:
        """The name of the first bound that the caption is beyond."""
        tokens = caption["num_tokens"]
        if self.min_logprob is not None and caption["logprob"] < self.min_logprob * tokens:
            return "min_logprob"
        if self.min_tokens is not None and tokens < self.min_tokens:
            return "min_tokens"
        if self.max_tokens is not None and tokens > self.max_tokens:
            return "max_tokens"
        return None

    def mark(self, record: Record) -> Record:
        """The record with `filtered`, the failed bound's name, where its caption is beyond one.

        Of several captions each is marked so; the record's own is the first.
        """
        if "caption" not in record:
            return record
        marked = _marked(record, self.failed(record))
        if "captions" in record:
            marked["captions"] = [_marked(each, self.failed(each)) for each in record["captions"]]
        return marked


def _marked(caption: Record, failed: str | None) -> Record:
    return {**caption, **({"filtered": failed} if failed else {})}


class Row(NamedTuple):
    """An image to be captioned: the start of its record, its pixels, and a hash of them.

    The hash is empty where duplicates are not looked for, and for what cannot be read.
    """

    about: Record
    pixels: np.ndarray | ImageError
    content: bytes


def row_reader(
    source: Source, pixels: Callable[[bytes], np.ndarray | ImageError], dedupe: bool
) -> Callable[[int], Row]:
    """A function from the index of an example to its row, for threads that read ahead."""
    read_example = example_reader(source, pixels)

    def read(index: int) -> Row:
        about, image = read_example(index)
        content = b""
        if dedupe and isinstance(image, np.ndarray):
            content = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
        return Row({"index": index, **about}, image, content)

    return read


def range_records(
    rows: Iterable[Row], caption: Callable[[Iterable], Iterator[Record]]
) -> Iterator[Record]:
    """The records of a range, in its order.

    `caption` completes them, as `LoadedModel.stream` does. Rows of the same content are captioned
    once; the later ones have what the first has, and its key as `duplicate_of`.
    """
    first: dict[bytes, int] = {}
    made: dict[int, Record] = {}  # of the first ones
    waiting: collections.deque[tuple[Record, int]] = collections.deque()

    def different() -> Iterator[tuple[Record, np.ndarray | ImageError]]:
        for about, pixels, content in rows:
            index = about["index"]
            if content and first.setdefault(content, index) != index:
                waiting.append((about, first[content]))
            else:
                yield about, pixels

    for record in caption(different()):
        while waiting and waiting[0][0]["index"] < record["index"]:
            about, original = waiting.popleft()
            yield _repeated(about, made[original])
        if first:
            made[record["index"]] = record
        yield record
    for about, original in waiting:
        yield _repeated(about, made[original])


def _repeated(about: Record, original: Record) -> Record:
    made = {name: value for name, value in original.items() if name not in _OF_THE_IMAGE}
    return {**about, "duplicate_of": original["key"], **made}


def count_records(records: Iterable[Record]) -> dict[str, int]:
    """How many there are, and how many have a caption, an error, and so on."""
    names = {
        "captions": "caption",
        "errors": "error",
        "filtered": "filtered",
        "duplicates": "duplicate_of",
    }
    counts = dict.fromkeys(("records", *names), 0)
    for record in records:
        counts["records"] += 1
        for name, field in names.items():
            counts[name] += field in record
    return counts
