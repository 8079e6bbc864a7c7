"""Captioning a corpus from end to end: into one file, or into the shards of a directory."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from capjax.decoding.corpus import Filters, Record, Row, range_records
from capjax.decoding.corpus_files import ShardDirectory
from capjax.decoding.corpus_meter import Meter
from capjax.decoding.corpus_records import json_line
from capjax.decoding.inputs import read_ahead

Caption = Callable[[Iterable], Iterator[Record]]  # as `LoadedModel.stream`


def captioned_ranges(
    ranges: Sequence[tuple[int, int]],
    read: Callable[[int], Row],
    caption: Caption,
    filters: Filters,
    meter: Meter,
    *,
    ahead: int,
) -> Iterator[Iterator[Record]]:
    """The records of each range (start, stop); each must be drawn before the next.

    Rows are read `ahead` of what is asked for, over the ends of ranges too.
    """
    indices = itertools.chain.from_iterable(itertools.starmap(range, ranges))
    rows = meter.reading(read_ahead(read, indices, ahead))

    def records(count: int) -> Iterator[Record]:
        for record in range_records(itertools.islice(rows, count), caption):
            marked = filters.mark(record)
            meter.made(marked)
            yield marked

    for start, stop in ranges:
        yield records(stop - start)


def write_file(path: Path, ranges: Iterable[Iterable[Record]], meter: Meter) -> None:
    """JSON lines. Grows as `PATH.partial` and is renamed when complete."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        for record in itertools.chain.from_iterable(ranges):
            with meter.waiting("output"):
                file.write(json_line(record))
    partial.replace(path)


def write_shards(
    directory: ShardDirectory,
    numbers: Sequence[int],
    ranges: Iterable[Iterable[Record]],
    meter: Meter,
) -> None:
    """One shard a range, written while the next one is captioned."""
    writing: Future | None = None
    with ThreadPoolExecutor(1) as writer:
        for number, records in zip(numbers, ranges, strict=True):
            made = list(records)
            with meter.waiting("output"):
                if writing is not None:
                    writing.result()
            writing = writer.submit(directory.write, number, made)
        with meter.waiting("output"):
            if writing is not None:
                writing.result()
