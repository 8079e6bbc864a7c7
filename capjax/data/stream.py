"""The order of the training stream: pure functions of (seed, position), with no state to save.

Position p of the stream is example p % N of epoch p // N, in an order shuffled anew each epoch.
Nothing here knows of batches, processes, workers or restarts, so none of them can change it.
"""

import functools
import math
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from capjax.data.captions import NoCaption
from capjax.data.decode import ImageError
from capjax.data.records import CorruptRecord

_MASK = (1 << 64) - 1
_ROUNDS = 8


def mix(*values: int) -> int:
    """64 well-mixed bits of a tuple of integers (SplitMix64's finalizer, chained)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


# Blocks whose examples are shuffled together, and so are held in memory.
WINDOW_BLOCKS = 16


@functools.lru_cache(maxsize=64)
def _round_keys(*values: int) -> tuple[int, ...]:
    return tuple(mix(*values, i) for i in range(_ROUNDS))


def example_index(seed: int, position: int, num_examples: int) -> int:
    """Which example stands at a position: each once an epoch, in O(1) time and memory.

    (Grain's own shuffle takes up to 10 ms an index for sources of a few examples, and 32 bits.)
    """
    epoch, index = divmod(position, num_examples)
    return _permute(index, num_examples, _round_keys(seed, epoch))


def block_example_index(
    seed: int, position: int, num_examples: int, block_size: int, window: int = WINDOW_BLOCKS
) -> int:
    """As `example_index`, in an order that reads a source by blocks of neighbouring examples.

    Block b is the examples [b * block_size, (b + 1) * block_size), the last of them shorter. The
    blocks are shuffled anew each epoch, and so are the examples of every `window` blocks' worth of
    positions, which lie in at most `window` + 2 blocks. Each example once an epoch, in O(1). The
    order by blocks of one is `example_index`'s.
    """
    if block_size == 1:
        return example_index(seed, position, num_examples)
    epoch, index = divmod(position, num_examples)
    number, within = divmod(index, window * block_size)
    first = number * window * block_size
    count = min(window * block_size, num_examples - first)
    index = first + _permute(within, count, _round_keys(seed, epoch, number))
    full, rest = divmod(num_examples, block_size)
    # The short block has a place of its own, so that every other block is as long as its place.
    before_rest = mix(seed, epoch) % (full + 1) * block_size
    if index >= before_rest + rest:
        index -= rest
    elif index >= before_rest:
        return full * block_size + index - before_rest
    place, offset = divmod(index, block_size)
    return _permute(place, full, _round_keys(seed, epoch)) * block_size + offset


def _permute(index: int, count: int, keys: tuple[int, ...]) -> int:
    """Where the keys' permutation of `range(count)` takes an index.

    A Feistel network over pairs (a, b) of remainders, a x b just above `count`; a result beyond it
    is permuted again until it is within.
    """
    size = math.isqrt(count - 1) + 1  # at least the square root
    while True:
        a, b = divmod(index, size)
        a_size, b_size = -(-count // size), size
        for key in keys:
            h = (a + key) * 0xBF58476D1CE4E5B9 & _MASK
            h = (h ^ h >> 29) * 0x94D049BB133111EB & _MASK
            a, b = (b + (h >> 32)) % b_size, a
            a_size, b_size = b_size, a_size
        index = a * size + b
        if index < count:
            return index


def substitute_index(seed: int, position: int, attempt: int, num_examples: int) -> int:
    """Which example stands in at a position where `attempt` >= 1 examples could not be used."""
    return mix(seed, position, attempt) % num_examples


def position_rng(seed: int, position: int) -> np.random.Generator:
    """The random numbers of one position. Philox: distinct keys give independent streams."""
    key: Any = _Key(mix(seed), position)  # NumPy's types do not name such seeds
    return np.random.Generator(np.random.Philox(key))


class _Key(ISeedSequence):
    """Philox's key. As its `key` it costs twice the time: NumPy then seeds it by the system too."""

    def __init__(self, *words: int) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: object = np.uint32) -> np.ndarray:
        return np.array(self._words, np.uint64)


def bad_reason(error: CorruptRecord | ImageError | NoCaption) -> str:
    """A short reason to count by: few distinct ones, whatever the record."""
    if isinstance(error, ImageError):
        return error.reason
    return "unreadable record" if isinstance(error, CorruptRecord) else "no caption"
