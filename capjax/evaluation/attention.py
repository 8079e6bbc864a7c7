"""Where a captioner looked for each word of a caption, as a page shows it."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from capjax.data.tokenizer import Tokenizer
from capjax.training.workdir import write_atomic


class WordMaps(NamedTuple):
    """The words of a caption, and for each the patches of the image, row by row."""

    words: list[str]
    grid: tuple[int, int]  # rows and columns of patches
    weights: np.ndarray  # uint8 [words, patches]; 255 is the patch a word looks at most


def word_maps(
    tokenizer: Tokenizer, ids: Sequence[int], weights_LP: np.ndarray, grid: tuple[int, int]
) -> WordMaps:
    """The maps of the tokens of a caption, joined to those of its words.

    Args:
      ids: the caption's tokens, its end left out.
      weights_LP: weights >= 0 of at least these tokens, over the patches.

    A word is what stands between spaces. It has the mean over the tokens that spell a part of it,
    so words that one token spells together have the same map.
    """
    text = tokenizer.decode(ids)
    lengths = [len(tokenizer.decode(ids[:count])) for count in range(len(ids) + 1)]
    # Where each token ends in the text. Bytes of a character in part decode to something longer.
    ends = np.minimum.accumulate(lengths[::-1])[::-1]
    words, maps, start = text.split(), [], 0
    for word in words:
        start = text.index(word, start)
        stop = start + len(word)
        spells = (ends[:-1] < stop) & (ends[1:] > start)
        maps.append(weights_LP[: len(ids)][spells].mean(0))
        start = stop
    return WordMaps(words, grid, _quantized(np.reshape(maps, (-1, weights_LP.shape[1]))))


def _quantized(weights_WP: np.ndarray) -> np.ndarray:
    """uint8 of weights >= 0: each row in parts of its greatest, which is 255."""
    greatest_W1 = weights_WP.max(axis=1, keepdims=True, initial=np.finfo(np.float32).tiny)
    return np.rint(255 * weights_WP / greatest_W1).astype(np.uint8)


def write_word_maps(path: epath.PathLike, maps: Mapping[str, WordMaps]) -> None:
    """Writes one JSON object, all or nothing: each example's `words`, `grid` and `weights`."""
    content = {
        key: {"words": found.words, "grid": list(found.grid), "weights": found.weights.tolist()}
        for key, found in maps.items()
    }
    write_atomic(path, json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
