"""Random images and tokens at no cost, for benchmarks of everything but the input."""

from collections.abc import Iterator

import numpy as np

from capjax.data.tokenizer import EOS_ID, PAD_ID, UNK_ID
from capjax.errors import UserError

_POOL = 512  # distinct examples; the stream repeats them


def synthetic_batches(
    *,
    image_size: int,
    text_length: int,
    vocab_size: int,
    batch_size: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches shaped as `train_batches`'; position p holds example p % 512 of a pool.

    The arrays are read-only views of the pool: no random numbers and no copies per batch.
    Raises `UserError` for sizes that do not fit.
    """
    if vocab_size <= 3 or text_length < 2 or batch_size % process_count or image_size < 1:
        raise UserError(
            f"vocab_size={vocab_size}, text_length={text_length}, batch_size={batch_size}: "
            f"expected more than 3, at least 2, and a multiple of the {process_count} processes"
        )
    rows = batch_size // process_count
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (_POOL, image_size, image_size, 3), np.uint8)
    tokens = rng.integers(UNK_ID + 1, vocab_size, (_POOL, text_length), np.int32)
    ends = rng.integers(1, text_length, _POOL)[:, None]
    column = np.arange(text_length)[None, :]
    tokens = np.where(column < ends, tokens, np.where(column == ends, EOS_ID, PAD_ID))
    # Long enough that a batch from any offset is one slice.
    wrapped = np.arange(_POOL + rows) % _POOL
    pool = {"image": image[wrapped], "tokens": tokens.astype(np.int32)[wrapped]}
    for array in pool.values():
        array.flags.writeable = False
    return _endless(pool, start + process_index * rows, rows, batch_size)


def _endless(
    pool: dict[str, np.ndarray], position: int, rows: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    while True:
        offset = position % _POOL
        batch = {name: array[offset : offset + rows] for name, array in pool.items()}
        positions = (position + np.arange(rows, dtype=np.uint64)).astype(np.uint32)
        yield {**batch, "position": positions}
        position += batch_size
