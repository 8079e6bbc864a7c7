"""Counting a source: captions, images, duplicates, and what two sources share."""

import dataclasses
import io
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from capjax.data.captions import clean_text
from capjax.data.prepare_example import HASH_BYTES, UNREADABLE, content_hash
from capjax.data.prepare_merge import first_equal
from capjax.data.records import CorruptRecord, Example
from capjax.data.sources import Source
from capjax.data.tokenizer import Tokenizer
from capjax.errors import UserError

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_UNKNOWN_PIECES = ("<unk>", "[UNK]")
_SHOWN = 5
_EXIF_ORIENTATION = 0x0112
_NO_PICTURE = "not an image"


class Tokens(NamedTuple):
    """Token lengths with the end, int64 [captions], and what the tokenizer has no words for.

    `truncated`: captions longer than `text_length`; `byte_pieces` and `unknown_pieces` are some
    of all `pieces`.
    """

    lengths: np.ndarray
    text_length: int
    truncated: int
    byte_pieces: int
    unknown_pieces: int
    pieces: int


class Repeated(NamedTuple):
    """Captions that occur again: how many beyond their first, and the commonest with counts."""

    count: int
    commonest: list[tuple[str, int]]


@dataclasses.dataclass(frozen=True)
class Stats:
    """What was counted. `num_read` of `num_examples` were looked at, evenly spread.

    `widths`, `heights` (as shown, in pixels) and `sizes` (bytes) are of the images whose header
    can be read; `words` of all captions; `keys` and `contents` are hashes uint8 [N, HASH_BYTES].
    """

    name: str
    num_examples: int
    num_read: int
    bad: Counter[str]
    captions_per_image: np.ndarray
    words: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    sizes: np.ndarray
    formats: Counter[str]
    languages: Counter[str]
    caption_sources: Counter[str]
    keys: np.ndarray
    contents: np.ndarray
    indices: np.ndarray
    repeated_captions: Repeated
    tokens: Tokens | None

    @property
    def repeated_keys(self) -> int:
        """Examples that have the key of an earlier one."""
        return num_repeated(self.keys)

    @property
    def repeated_images(self) -> int:
        """Examples that have an earlier one's image, byte for byte."""
        return num_repeated(self.contents)


class Shared(NamedTuple):
    """Examples of the `second` source whose image or key is in the `first`, and some keys."""

    first: str
    second: str
    images: int
    keys: int
    some: list[str]


def measure(
    source: Source,
    name: str,
    *,
    tokenizer: Tokenizer | None = None,
    text_length: int = 64,
    lower: bool = True,
    max_examples: int = 1_000_000,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Stats:
    """Looks at up to `max_examples` examples. Images are not decoded: their headers are read.

    `lower`: texts are lower-cased, as in training. Memory: about 100 bytes an example and caption.
    """
    count = min(len(source), max_examples)
    if not count:
        raise UserError(f"{source!r} has 0 examples: expected at least one")
    tally = _Tally(tokenizer, text_length, lower)
    for i in range(count):
        index = i * len(source) // count
        try:
            tally.add(index, source[index])
        except CorruptRecord:
            tally.bad[UNREADABLE] += 1
        report(i + 1, count)
    return tally.stats(source, name, count)


class _Tally:
    """Numbers as they come, in lists and hashes of 16 bytes."""

    def __init__(self, tokenizer: Tokenizer | None, text_length: int, lower: bool) -> None:
        self.tokenizer, self.text_length, self.lower = tokenizer, text_length, lower
        self.bad, self.formats = Counter(), Counter()
        self.languages, self.caption_sources = Counter(), Counter()
        self.per_image, self.words, self.lengths = [], [], []
        self.widths, self.heights, self.sizes = [], [], []
        self.byte_pieces = self.unknown_pieces = self.pieces = 0
        self.indices, self.caption_indices = [], []
        self.keys, self.contents, self.captions = bytearray(), bytearray(), bytearray()

    def add(self, index: int, example: Example) -> None:
        self.indices.append(index)
        self.keys += content_hash(example.key.encode(errors="replace"))
        self.contents += content_hash(example.image)
        self.per_image.append(len(example.captions))
        self._add_image(example.image)
        for caption in example.captions:
            self.languages[caption.language] += 1
            self.caption_sources[caption.source] += 1
            text = clean_text(caption.text, self.lower)
            self.words.append(len(text.split()))
            self.captions += content_hash(text.encode(errors="replace"))
            self.caption_indices.append(index)
            if self.tokenizer is not None:
                pieces = self.tokenizer.pieces(text)
                self.lengths.append(self.tokenizer.count(text))
                self.pieces += len(pieces)
                self.byte_pieces += sum(bool(_BYTE_PIECE.fullmatch(piece)) for piece in pieces)
                self.unknown_pieces += sum(piece in _UNKNOWN_PIECES for piece in pieces)

    def _add_image(self, data: bytes) -> None:
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8):
                    width, height = height, width
                self.formats[image.format or "unknown"] += 1
        except Exception:  # Pillow raises a dozen kinds on damaged input
            self.bad[_NO_PICTURE] += 1
            return
        self.widths.append(width)
        self.heights.append(height)
        self.sizes.append(len(data))

    def stats(self, source: Source, name: str, count: int) -> Stats:
        tokens = None
        lengths = np.array(self.lengths, np.int64)
        if self.tokenizer is not None:
            cut = int((lengths > self.text_length).sum())
            counts = (self.byte_pieces, self.unknown_pieces, self.pieces)
            tokens = Tokens(lengths, self.text_length, cut, *counts)
        return Stats(
            name=name,
            num_examples=len(source),
            num_read=count,
            bad=self.bad,
            captions_per_image=np.array(self.per_image, np.int64),
            words=np.array(self.words, np.int64),
            widths=np.array(self.widths, np.int64),
            heights=np.array(self.heights, np.int64),
            sizes=np.array(self.sizes, np.int64),
            formats=self.formats,
            languages=self.languages,
            caption_sources=self.caption_sources,
            keys=_hashes(self.keys),
            contents=_hashes(self.contents),
            indices=np.array(self.indices, np.int64),
            repeated_captions=self._repeated(source),
            tokens=tokens,
        )

    def _repeated(self, source: Source) -> Repeated:
        hashes = _hashes(self.captions)
        first, counts = np.unique(first_equal(hashes), return_counts=True)
        commonest = []
        for i in np.argsort(-counts, kind="stable")[:_SHOWN].tolist():
            if counts[i] > 1:
                texts = source[self.caption_indices[first[i]]].captions
                cleaned = [clean_text(caption.text, self.lower) for caption in texts]
                wanted = hashes[first[i]].tobytes()
                is_it = (t for t in cleaned if content_hash(t.encode(errors="replace")) == wanted)
                commonest.append((next(is_it), int(counts[i])))
        return Repeated(int(counts.sum() - len(counts)), commonest)


def _hashes(data: bytearray) -> np.ndarray:
    return np.frombuffer(bytes(data), np.uint8).reshape(-1, HASH_BYTES)


def num_repeated(hashes: np.ndarray) -> int:
    """How many rows of uint8 [N, HASH_BYTES] equal an earlier one."""
    return int((first_equal(hashes) != np.arange(len(hashes))).sum())


def shared(first: Stats, second: Stats, source: Source) -> Shared:
    """What the `second` source, `source`, has of the `first`: the same image bytes or key."""
    of_first = []
    for a, b in ((first.contents, second.contents), (first.keys, second.keys)):
        found = first_equal(np.concatenate([a, b]))[len(a) :] < len(a)
        of_first.append(found)
    images, keys = of_first
    rows = np.flatnonzero(images if images.any() else keys)[:_SHOWN]
    some = [source[index].key for index in second.indices[rows].tolist()]
    return Shared(first.name, second.name, int(images.sum()), int(keys.sum()), some)


def quantiles(values: np.ndarray) -> list[float]:
    """The least, 1 %, median, 99 % and largest of some numbers; nothing of none."""
    if not len(values):
        return []
    return [float(q) for q in np.quantile(values, (0, 0.01, 0.5, 0.99, 1), method="nearest")]
