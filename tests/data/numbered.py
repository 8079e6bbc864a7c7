"""Examples that show their number, and what reads it off a batch."""

import io
import itertools
from functools import cache

import numpy as np
from PIL import Image

from capjax.data.pipeline import Batches
from capjax.data.records import Caption, CorruptRecord, Example
from capjax.data.tokenizer import Tokenizer

SIZE = 8

BAD = {4: "image", 11: "record", 12: "record", 20: "caption"}


def make_example(i: int) -> Example:
    """Example i: its number is in the colour, its caption and, as a pattern, in the pixels."""
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[...] = (i % 256, i // 256 % 256, 255)
    pixels[: SIZE // 2, : SIZE // 2, 2] = np.arange(16).reshape(4, 4) * 13
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    captions = (Caption(f"Example {i}", "tts"), Caption(f"number {i}", "keyword"))
    return Example(f"k{i}", buffer.getvalue(), captions)


class Source:
    """`length` examples in memory; `bad` maps an index to what is wrong with it."""

    def __init__(self, length: int, bad: dict[int, str] | None = None) -> None:
        self.length, self.bad = length, bad or {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Example:
        wrong = self.bad.get(i)
        if wrong == "record":
            raise CorruptRecord("shard", i, "crc")
        example = make_example(i)
        if wrong == "caption":
            return example._replace(captions=())
        return example._replace(image=b"garbage") if wrong == "image" else example


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"example {i} number" for i in range(100)], 300)


def take(batches: Batches, count: int) -> dict[str, np.ndarray]:
    """`count` batches, joined along the rows."""
    with batches:
        taken = list(itertools.islice(batches, count))
    return {name: np.concatenate([batch[name] for batch in taken]) for name in taken[0]}


def example_ids(batch: dict[str, np.ndarray]) -> list[int]:
    """The examples in an unaugmented batch, read off a corner pixel."""
    corner = batch["image"][:, -1, -1].astype(int)
    return (corner[:, 0] + 256 * corner[:, 1]).tolist()
