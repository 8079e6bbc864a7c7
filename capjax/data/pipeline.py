"""The data graph: batches as a pure function of (settings, seed, position), on Grain.

One Grain element is one batch: this process's rows of a global batch. Row r of batch k stands at
position `start` + k * batch_size + r of the stream (`capjax.data.stream`), so batches are the same
bit for bit for any number of threads, worker processes, processes and restarts, and to seek is to
begin at another number. Nothing filters: a bad example is replaced where it stands.

Threads are the default: Pillow and SentencePiece release the interpreter lock for most of their
time, a thread starts at once and shares the decoded images, while a worker process costs seconds
and 200 MB. Worker processes pay where there are many cores and heavy transforms.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from capjax.data.images import ImageError, ImagePreprocessing, decode_image
from capjax.data.records import CorruptRecord, Example
from capjax.data.sources import Source
from capjax.data.stream import (
    DataError,
    bad_reason,
    example_index,
    position_rng,
    substitute_index,
)
from capjax.data.synthetic import synthetic_batches
from capjax.data.tokenizer import Tokenizer
from capjax.data.transforms import (
    Augment,
    CaptionChoice,
    NoCaption,
    augment_image,
    choose_caption,
    first_caption,
)
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

HostBatch = dict[str, np.ndarray]
_BAD = "_bad"  # the batch's bad records, taken out before the batch is handed on
_ENDLESS = 1 << 62
_MAX_ATTEMPTS = 16
_MIN_SEEN = 200  # the share of bad records means nothing before
_MAX_LISTED = 10_000


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


class BadRecord(NamedTuple):
    """One example that could not be used: its place in the stream and in the source, and why."""

    position: int
    index: int
    reason: str
    detail: str


class Batches:
    """An iterator of batches that counts what could not be used. Close it, or use it in `with`.

    `bad`: reason -> number; `bad_records`: the first 10 000 of them; `seen`: positions delivered.
    Only what was delivered counts, not what was made ahead. Raises `DataError` once more than
    `bad_budget` of at least 200 positions were bad.
    """

    def __init__(self, batches: Iterator[dict[str, Any]], bad_budget: float, source: str) -> None:
        self._batches = batches
        self._bad_budget = bad_budget
        self._source = source
        self.bad: Counter[str] = Counter()
        self.bad_records: list[BadRecord] = []
        self.seen = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> HostBatch:
        batch = next(self._batches)
        bad = [BadRecord(*record) for record in batch.pop(_BAD)]
        self.seen += len(batch["image"])
        self.bad.update(record.reason for record in bad)
        self.bad_records += bad[: _MAX_LISTED - len(self.bad_records)]
        total = self.bad.total()
        if self.seen >= _MIN_SEEN and total > self._bad_budget * self.seen:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.bad.most_common())
            first = self.bad_records[0]
            raise DataError(
                f"{total} of {self.seen} examples cannot be used, more than bad_budget="
                f"{self._bad_budget}: {reasons}; the first is example {first.index} of "
                f"{self._source}: {first.detail}; mend the source or raise the budget"
            )
        return batch

    def close(self) -> None:
        """Ends the threads and worker processes."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Images:
    """Examples with their decoded image, from a source; kept while they all fit into the limit."""

    def __init__(self, source: Source, megabytes: int) -> None:
        self.source = source
        self._limit = self._room = megabytes << 20
        self._kept: dict[int, tuple[Example, np.ndarray]] = {}

    def read(self, index: int) -> tuple[Example, np.ndarray]:
        """The example without its bytes, and uint8 [H, W, 3]. Raises as the source and decoder."""
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        example = self.source[index]
        pair = example._replace(image=b""), decode_image(example.image)
        if self._room > 0:  # threads may both add an image: it is counted twice, never wrong
            self._kept[index] = pair
            self._room -= pair[1].nbytes
            if self._room <= 0:
                self._kept = {}
        return pair

    def __getstate__(self) -> tuple[Source, int]:
        return self.source, self._limit >> 20

    def __setstate__(self, state: tuple[Source, int]) -> None:
        self.__init__(*state)


@dataclasses.dataclass(frozen=True)
class _Maker:
    """Makes this process's rows of a global batch from its number. Picklable."""

    images: _Images
    tokenizer: Tokenizer
    preprocessing: ImagePreprocessing
    captions: CaptionChoice
    text_length: int
    batch_size: int
    first_row: int
    num_rows: int

    def empty_images(self) -> np.ndarray:
        size = self.preprocessing.image_size
        return np.zeros((self.num_rows, size, size, 3), np.uint8)


@dataclasses.dataclass(frozen=True)
class _TrainMaker(_Maker):
    augment: Augment
    seed: int
    start: int

    def __call__(self, step: int) -> dict[str, Any]:
        first = self.start + step * self.batch_size + self.first_row
        batch_images, texts, bad = self.empty_images(), [], []
        for row in range(self.num_rows):
            batch_images[row], text = self._pair(first + row, bad)
            texts.append(text)
        positions = (first + np.arange(self.num_rows, dtype=np.uint64)).astype(np.uint32)
        return {
            "image": batch_images,
            "tokens": self.tokenizer.encode_batch(texts, self.text_length),
            "position": positions,
            _BAD: bad,
        }

    def _pair(self, position: int, bad: list[BadRecord]) -> tuple[np.ndarray, str]:
        """The image and text at a position; what could not be used on the way is added to `bad`."""
        num_examples = len(self.images.source)
        index = example_index(self.seed, position, num_examples)
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                example, image = self.images.read(index)
                rng = position_rng(self.seed, position)
                text = choose_caption(example, self.captions, rng)
                return augment_image(image, text, self.preprocessing, self.augment, rng), text
            except (CorruptRecord, ImageError, NoCaption) as error:
                bad.append(BadRecord(position, index, bad_reason(error), str(error)))
                index = substitute_index(self.seed, position, attempt, num_examples)
        raise DataError(
            f"{_MAX_ATTEMPTS} examples in a row cannot be used at position {position} of "
            f"{self.images.source!r}; the last: {bad[-1].detail}"
        )


@dataclasses.dataclass(frozen=True)
class _EvalMaker(_Maker):
    num_examples: int  # of the source's, evenly spread

    def __call__(self, step: int) -> dict[str, Any]:
        first = step * self.batch_size + self.first_row
        batch_images, bad = self.empty_images(), []
        texts = [""] * self.num_rows
        index = np.zeros(self.num_rows, np.int32)
        mask = np.zeros(self.num_rows, np.bool_)
        for row in range(min(self.num_rows, self.num_examples - first)):
            i = (first + row) * len(self.images.source) // self.num_examples
            index[row] = i
            try:
                example, image = self.images.read(i)
                batch_images[row] = self.preprocessing.preprocess(image)
            except (CorruptRecord, ImageError) as error:
                bad.append(BadRecord(first + row, i, bad_reason(error), str(error)))
                continue
            mask[row] = True
            with contextlib.suppress(NoCaption):
                texts[row] = first_caption(example, self.captions)
        return {
            "image": batch_images,
            "tokens": self.tokenizer.encode_batch(texts, self.text_length),
            "mask": mask,
            "index": index,
            _BAD: bad,
        }


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
    process_index: int = 0,
    process_count: int = 1,
    reading: Reading = Reading(),
    bad_budget: float = 0.01,
) -> Batches:
    """The endless training stream from position `start` (examples seen), this process's rows.

    Each batch: `image` uint8 [R, S, S, 3], `tokens` int32 [R, text_length], `position` uint32 [R]
    (modulo 2^32), with R = batch_size / process_count. Seeking costs nothing. Memory:
    max(prefetch, num_threads) batches in each reading process, and the cache.
    Raises `UserError` for impossible settings now, and `DataError` from the iterator.
    """
    _check(source, text_length, batch_size, process_index, process_count)
    if start < 0 or seed < 0 or not 0 <= bad_budget <= 1:
        raise UserError(
            f"start={start}, seed={seed}, bad_budget={bad_budget}: expected start >= 0, "
            "seed >= 0 and a budget from 0 to 1"
        )
    rows = batch_size // process_count
    make_batch = _TrainMaker(
        images=_Images(source, reading.cache_megabytes),
        tokenizer=tokenizer,
        preprocessing=preprocessing,
        captions=captions,
        text_length=text_length,
        batch_size=batch_size,
        first_row=process_index * rows,
        num_rows=rows,
        augment=augment,
        seed=seed,
        start=start,
    )
    return Batches(_read(make_batch, _ENDLESS, reading), bad_budget, repr(source))


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
    make_batch = _EvalMaker(
        images=_Images(source, reading.cache_megabytes),
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
        dataset = dataset.mp_prefetch(workers, worker_init_fn=_die_with_parent)
    return iter(dataset)


def _die_with_parent(worker_index: int, num_workers: int) -> None:
    """Ends this worker when the process that started it is gone, even by kill -9.

    A thread waits for the pipe that only the parent holds open. (Linux's PR_SET_PDEATHSIG would
    tell of the end of the starting *thread*, which is one of Grain's, and of nothing if the parent
    ended earlier.)
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        # The time limit covers a forked sibling that inherited the other end of the pipe.
        while not connection.wait([parent.sentinel], timeout=1) and os.getppid() == parent.pid:
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="capjax-die-with-parent").start()
