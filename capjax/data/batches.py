"""Making batches and counting what could not be used: the work behind `capjax.data.pipeline`.

A maker turns the number of a global batch into this process's rows of it, and is a pure function;
`Batches` hands them on and stops the run where too much is bad.
"""

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from capjax.data.augmentation import Augment, augment_image
from capjax.data.captions import CaptionChoice, NoCaption, choose_captions, first_caption
from capjax.data.curriculum import BagOrder
from capjax.data.decode import ImageError, decode_image
from capjax.data.images import ImagePreprocessing
from capjax.data.mixture import Mixture, MixtureOrder
from capjax.data.records import CorruptRecord, Example
from capjax.data.sources import Source, block_size
from capjax.data.stream import (
    bad_reason,
    block_example_index,
    mix,
    position_rng,
    substitute_index,
)
from capjax.data.tokenizer import PAD_ID, Tokenizer
from capjax.errors import UserError

HostBatch = dict[str, np.ndarray]
_BAD = "_bad"  # the batch's bad records, taken out before the batch is handed on
_MAX_ATTEMPTS = 16
_MIN_SEEN = 200  # the share of bad records means nothing before
_MAX_LISTED = 10_000


class DataError(UserError):
    """So many records cannot be used that the source itself must be wrong."""


class BadRecord(NamedTuple):
    """One example that could not be used: its place in the stream and in the source, and why."""

    position: int
    index: int
    reason: str
    detail: str


def check_budget(bad: Counter[str], seen: int, bad_budget: float, example: str) -> None:
    """Raises `DataError` where more than the budget of at least 200 positions were bad.

    Args:
      bad: reason -> number.
      example: what is said of the records themselves.
    """
    if seen >= _MIN_SEEN and bad.total() > bad_budget * seen:
        reasons = ", ".join(f"{reason} {count}" for reason, count in bad.most_common())
        raise DataError(
            f"{bad.total()} of {seen} examples cannot be used, more than bad_budget={bad_budget}: "
            f"{reasons}; {example}; mend the source or raise the budget"
        )


class Batches:
    """An iterator of batches that counts what could not be used. Close it, or use it in `with`.

    `bad`: reason -> number; `bad_records`: the first 10 000 of them; `seen`: positions delivered.
    `on_bad` is given those of each batch as it is delivered.
    Only what was delivered counts, not what was made ahead. Raises `DataError` once more than
    `bad_budget` of at least 200 positions were bad.
    """

    def __init__(
        self,
        batches: Iterator[dict[str, Any]],
        bad_budget: float,
        source: str,
        on_bad: Callable[[list[BadRecord]], None] = lambda records: None,
    ) -> None:
        self._batches = batches
        self._on_bad = on_bad
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
        self._on_bad(bad)
        if self.bad_records:
            first = self.bad_records[0]
            example = f"the first is example {first.index} of {self._source}: {first.detail}"
            check_budget(self.bad, self.seen, self._bad_budget, example)
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


class DecodedImages:
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
class Maker:
    """Makes this process's rows of a global batch from its number. Picklable."""

    images: DecodedImages
    tokenizer: Tokenizer
    preprocessing: ImagePreprocessing
    captions: CaptionChoice
    text_length: int
    batch_size: int
    first_row: int
    num_rows: int

    def images_shape(self) -> tuple[int, int, int, int]:
        size = self.preprocessing.image_size
        return self.num_rows, size, size, 3


class Row(NamedTuple):
    """A row of a training batch before its texts are encoded, in at most `length` tokens each."""

    index: int  # of the example in the source
    image: np.ndarray
    texts: Sequence[str]
    length: int


@dataclasses.dataclass(frozen=True)
class TrainMaker(Maker):
    augment: Augment
    seed: int
    start: int
    with_index: bool

    def __call__(self, step: int) -> dict[str, Any]:
        first = self.start + step * self.batch_size + self.first_row
        bad: list[BadRecord] = []
        rows = [self._row(first + row, bad) for row in range(self.num_rows)]
        batch = self._batch(first, rows, bad)
        if self.with_index:
            batch["index"] = np.array([row.index for row in rows], np.int32)
            batch["mask"] = np.ones(self.num_rows, np.bool_)
            batch["bag"] = np.zeros(self.num_rows, np.int32)
        return batch

    def _batch(self, first: int, rows: Sequence[Row], bad: list[BadRecord]) -> dict[str, Any]:
        """The rows from position `first` on as arrays."""
        batch_images = np.empty(self.images_shape(), np.uint8)
        texts, lengths = [], []
        for number, row in enumerate(rows):
            batch_images[number] = row.image
            texts += row.texts
            lengths += [row.length] * len(row.texts)
        tokens = self._encode(texts, np.array(lengths))
        if self.captions.per_image > 1:
            tokens = tokens.reshape(self.num_rows, self.captions.per_image, self.text_length)
        positions = (first + np.arange(self.num_rows, dtype=np.uint64)).astype(np.uint32)
        return {
            "image": batch_images,
            "tokens": tokens,
            "position": positions,
            _BAD: bad,
        }

    def _row(self, position: int, bad: list[BadRecord]) -> Row:
        """What stands at a position. What could not be used on the way is added to `bad`."""
        first, part, seed, own_position, dataset = self._place(position)
        num_examples = len(part)
        index = first + block_example_index(seed, own_position, num_examples, block_size(part))
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            row = self._use(index, position, dataset, bad)
            if row is not None:
                return row
            index = first + substitute_index(seed, position, attempt, num_examples)
        raise DataError(
            f"{_MAX_ATTEMPTS} examples in a row cannot be used at position {position} of "
            f"{self.images.source!r}; the last: {bad[-1].detail}"
        )

    def _use(self, index: int, position: int, dataset: str, bad: list[BadRecord]) -> Row | None:
        """The example of this index at a position; None, and one more in `bad`, if it is bad."""
        try:
            example, image = self.images.read(index)
            rng = position_rng(self.seed, position)
            texts = choose_captions(example, self.captions, rng, dataset)
            image = augment_image(image, " ".join(texts), self.preprocessing, self.augment, rng)
        except (CorruptRecord, ImageError, NoCaption) as error:
            bad.append(BadRecord(position, index, bad_reason(error), str(error)))
            return None
        return Row(index, image, texts, self._length(dataset))

    def _length(self, dataset: str) -> int:
        """The greatest number of tokens of a caption of that source of the mixture."""
        return min(self.captions.of(dataset).max_tokens or self.text_length, self.text_length)

    def _encode(self, texts: list[str], lengths: np.ndarray) -> np.ndarray:
        """int32 [N, text_length]: each text in at most its length of tokens."""
        tokens = np.full((len(texts), self.text_length), PAD_ID, np.int32)
        for length in set(lengths.tolist()):
            rows = np.flatnonzero(lengths == length)
            tokens[rows, :length] = self.tokenizer.encode_batch([texts[i] for i in rows], length)
        return tokens

    def _place(self, position: int) -> tuple[int, Source, int, int, str]:
        """The source at a position: its first index, itself, seed, own position, name."""
        source = self.images.source
        if not isinstance(source, Mixture):
            return 0, source, self.seed, position, ""
        number, own_position = self._order.place(position)
        first, _ = source.span(number)
        seed, name = mix(self.seed, number), source.names[number]
        return first, source.sources[number], seed, own_position, name

    @functools.cached_property
    def _order(self) -> MixtureOrder:
        assert isinstance(self.images.source, Mixture)
        return self.images.source.order(self.seed)


@dataclasses.dataclass(frozen=True)
class BagMaker(TrainMaker):
    """Rows in an order of bags. No other example stands in for a bad one: its row is masked."""

    order: BagOrder

    def __call__(self, step: int) -> dict[str, Any]:
        first = self.start + step * self.batch_size + self.first_row
        index_R, mask_R, bag_R = self.order.rows(
            self.start // self.batch_size + step,
            self.first_row // self.num_rows,
            self.batch_size // self.num_rows,
        )
        size = self.preprocessing.image_size
        blank = np.zeros((size, size, 3), np.uint8)
        rows, bad = [], []
        for number, index in enumerate(index_R.tolist()):
            row = None
            if mask_R[number]:
                source = self.images.source
                dataset = source.name_at(index) if isinstance(source, Mixture) else ""
                row = self._use(index, first + number, dataset, bad)
                mask_R[number] = row is not None
            rows.append(row or Row(index, blank, [""] * self.captions.per_image, self.text_length))
        beside = {"index": index_R, "mask": mask_R, "bag": bag_R}
        return self._batch(first, rows, bad) | beside


@dataclasses.dataclass(frozen=True)
class EvalMaker(Maker):
    num_examples: int  # of the source's, evenly spread

    def __call__(self, step: int) -> dict[str, Any]:
        first = step * self.batch_size + self.first_row
        batch_images, bad = np.zeros(self.images_shape(), np.uint8), []
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
