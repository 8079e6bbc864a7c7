"""The data graph: batches as a pure function of (settings, seed, position), on Grain.

One Grain element is one batch: this process's rows of a global batch. Row r of batch k stands at
position `start` + k * batch_size + r of the stream (`capjax.data.stream`), so batches are the same
bit for bit for any number of threads, worker processes, processes and restarts, and to seek is to
begin at another number. Nothing filters: a bad example is replaced where it stands.

Threads are the default. Pillow decodes and resizes without the interpreter lock, a thread starts
at once and shares the decoded images; a worker process starts in 4 s, takes 210 MB, and keeps its
own images (two busy cores, 64-pixel WebP: 5 600-9 500 images/s with threads and the cache, 3 900
with two workers, 2 000 and 1 700 without the cache). Worker processes are for many cores. Making
a whole batch per element took a fifth to a third less time than making and joining examples.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import grain
from absl import flags

from capjax.data.augmentation import Augment
from capjax.data.batches import (
    BadRecord,
    BagMaker,
    Batches,
    DataError,
    DecodedImages,
    EvalMaker,
    TrainMaker,
)
from capjax.data.captions import CaptionChoice
from capjax.data.curriculum import BagOrder
from capjax.data.images import ImagePreprocessing
from capjax.data.processes import die_with_parent, ignore_signals
from capjax.data.sources import Source
from capjax.data.synthetic import synthetic_batches
from capjax.data.tokenizer import Tokenizer
from capjax.errors import UserError

__all__ = [
    "BadRecord",
    "Batches",
    "DataError",
    "Reading",
    "eval_batches",
    "synthetic_batches",
    "train_batches",
]

_ENDLESS = 1 << 62


@dataclasses.dataclass(frozen=True)
class Reading:
    """How batches are made; it changes the speed and nothing else.

    `num_threads`: threads in each process that reads (0: none, a batch is made when asked for);
    `num_workers`: worker processes (0: threads of this process alone); `prefetch`: batches made
    ahead in each reading process; `cache_megabytes`: decoded images are kept up to this size in
    each reading process, and dropped for good where the source turns out to be larger.
    """

    num_threads: int = 2
    num_workers: int = 0
    prefetch: int = 4
    cache_megabytes: int = 256

    def __post_init__(self) -> None:
        for field, value in dataclasses.asdict(self).items():
            if value < 0:
                raise UserError(f"reading.{field}={value}: expected at least 0")


def train_batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    preprocessing: ImagePreprocessing,
    augment: Augment,
    captions: CaptionChoice = CaptionChoice(),  # noqa: B008
    text_length: int,
    batch_size: int,
    seed: int,
    start: int = 0,
    with_index: bool = False,
    bags: BagOrder | None = None,
    process_index: int = 0,
    process_count: int = 1,
    reading: Reading = Reading(),
    bad_budget: float = 0.01,
    on_bad: Callable[[list[BadRecord]], None] = lambda records: None,
) -> Batches:
    """The endless training stream from position `start` (examples seen), this process's rows.

    Each batch: `image` uint8 [R, S, S, 3], `tokens` int32 [R, text_length] (or [R, K, text_length]
    for K = captions.per_image > 1), `position` uint32 [R] (modulo 2^32), R = batch_size /
    process_count. `with_index` adds `index` int32 [R] (of the example in the source), `mask` bool
    [R] (all True) and `bag` int32 [R] (all 0: the batch is one bag). With `bags` the rows are in
    that order and the three are as in `BagRows`; rows of bad examples are masked too. Seeking costs
    nothing. Memory: max(prefetch, num_threads) batches in each reading process, and the cache.
    `on_bad` is given the bad records of each batch. Raises `UserError` for impossible settings now,
    and `DataError` from the iterator.
    """
    _check(source, text_length, batch_size, process_index, process_count)
    if start < 0 or seed < 0 or not (0 <= bad_budget <= 1 or bad_budget == math.inf):
        raise UserError(
            f"start={start}, seed={seed}, bad_budget={bad_budget}: expected start >= 0, "
            "seed >= 0 and a budget from 0 to 1"
        )
    if bags is not None:
        _check_bags(bags, source, batch_size, start, process_count)
    rows = batch_size // process_count
    settings: dict[str, Any] = {
        "images": DecodedImages(source, reading.cache_megabytes),
        "tokenizer": tokenizer,
        "preprocessing": preprocessing,
        "captions": captions,
        "text_length": text_length,
        "batch_size": batch_size,
        "first_row": process_index * rows,
        "num_rows": rows,
        "augment": augment,
        "seed": seed,
        "start": start,
        "with_index": with_index,
    }
    make_batch = TrainMaker(**settings) if bags is None else BagMaker(**settings, order=bags)
    return Batches(_read(make_batch, _ENDLESS, reading), bad_budget, repr(source), on_bad)


def eval_batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    preprocessing: ImagePreprocessing,
    captions: CaptionChoice = CaptionChoice(),  # noqa: B008
    text_length: int,
    batch_size: int,
    max_examples: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    reading: Reading = Reading(cache_megabytes=0),
    bad_budget: float = 0.01,
) -> Batches:
    """Each example of the source once, in order, without augmentation; this process's rows.

    Each batch: `image` uint8 [R, S, S, 3], `tokens` int32 [R, text_length] of the reference
    caption (EOS alone where there is none), `mask` bool [R] (False: padding, or an image that
    cannot be used) and `index` int32 [R] into the source. Every process gets the same number of
    batches. `max_examples` takes that many, evenly spread. Raises as `train_batches`.
    """
    _check(source, text_length, batch_size, process_index, process_count)
    if max_examples is not None and max_examples < 1:
        raise UserError(f"max_examples={max_examples}: expected at least 1, or none for all")
    count = min(len(source), max_examples or len(source))
    rows = batch_size // process_count
    make_batch = EvalMaker(
        images=DecodedImages(source, reading.cache_megabytes),
        tokenizer=tokenizer,
        preprocessing=preprocessing,
        captions=captions,
        text_length=text_length,
        batch_size=batch_size,
        first_row=process_index * rows,
        num_rows=rows,
        num_examples=count,
    )
    steps = -(-count // batch_size)
    return Batches(_read(make_batch, steps, reading), bad_budget, repr(source))


def _check(
    source: Source, text_length: int, batch_size: int, process_index: int, process_count: int
) -> None:
    if len(source) == 0:
        raise UserError(f"{source!r} has 0 examples: expected at least one")
    if text_length < 2:
        raise UserError(f"text_length={text_length}: expected at least 2 (a token and the end)")
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index={process_index}: expected 0 to {process_count - 1}")
    if batch_size < 1 or batch_size % process_count:
        below = batch_size // process_count * process_count
        raise UserError(
            f"batch_size={batch_size} does not divide over {process_count} processes; "
            f"use {max(below, process_count)} or {below + process_count}"
        )


def _check_bags(
    bags: BagOrder, source: Source, batch_size: int, start: int, process_count: int
) -> None:
    if bags.batch_size != batch_size or start % batch_size:
        raise UserError(
            f"batch_size={batch_size}, start={start}: bags in batches of {bags.batch_size} need "
            "that batch size, and a start at a whole batch"
        )
    if bags.groups % process_count:
        raise UserError(
            f"bags in {bags.groups} groups do not divide over {process_count} processes; use a "
            f"multiple of {process_count} groups"
        )
    if (last := max(int(rows.max()) for rows in bags.bags.values())) >= len(source):
        raise UserError(f"bags name example {last} of {source!r}: open them for this source")


def _read(
    make_batch: Callable[[int], dict[str, Any]], num_batches: int, reading: Reading
) -> Iterator[dict[str, Any]]:
    dataset = grain.MapDataset.range(num_batches).map(make_batch)
    ahead = max(reading.prefetch, reading.num_threads) if reading.num_threads else 0
    options = grain.ReadOptions(num_threads=reading.num_threads, prefetch_buffer_size=ahead)
    dataset = dataset.to_iter_dataset(options)
    if reading.num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which no absl app parsed here
            flags.FLAGS.mark_as_parsed()
        workers = grain.multiprocessing.MultiprocessingOptions(num_workers=reading.num_workers)
        dataset = dataset.mp_prefetch(workers, worker_init_fn=_start_worker)
    return iter(dataset)


def _start_worker(worker_index: int, num_workers: int) -> None:
    ignore_signals()
    die_with_parent()
