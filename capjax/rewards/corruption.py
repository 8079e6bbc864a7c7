"""Captions with their grammar broken, for a model of what is grammatical to learn from.

The five operations of Cho et al. 2022, "Fine-grained Image Captioning with CLIP Reward", and its
code, on words between white space; one of them is chosen evenly for each caption.
"""

from collections.abc import Callable, Sequence

import numpy as np

from capjax.errors import UserError

LARGEST = 3  # words of an n-gram, and times or words that an operation takes

Words = list[str]


def corrupt(text: str, vocabulary: Sequence[str], key: Sequence[int]) -> str:
    """The text after one operation, never the text itself or nothing at all.

    Args:
      vocabulary: words to insert, or to put in the place of others.
      key: whole numbers from 0 on, such as a seed and the text's place; the same give the same.

    Raises `UserError` where there is no word in the text or the vocabulary.
    """
    words = text.split()
    if not words or not vocabulary:
        raise UserError(
            f"text {text!r} with a vocabulary of {len(vocabulary)} words: expected a word at least"
        )
    rng = np.random.default_rng(key)
    while True:
        changed = OPERATIONS[rng.integers(len(OPERATIONS))](list(words), vocabulary, rng)
        if changed and changed != words:
            return " ".join(changed)


def repeat(words: Words, vocabulary: Sequence[str], rng: np.random.Generator) -> Words:
    """An n-gram once more in one to three places."""
    start, end = _ngram(words, rng)
    ngram = words[start:end]
    for _ in range(_few(rng)):
        place = rng.integers(len(words) + 1)
        words[place:place] = ngram
    return words


def remove(words: Words, vocabulary: Sequence[str], rng: np.random.Generator) -> Words:
    """Without an n-gram."""
    start, end = _ngram(words, rng)
    return words[:start] + words[end:]


def insert(words: Words, vocabulary: Sequence[str], rng: np.random.Generator) -> Words:
    """With one to three words of the vocabulary."""
    for _ in range(_few(rng)):
        words.insert(rng.integers(len(words)), _word(vocabulary, rng))
    return words


def swap(words: Words, vocabulary: Sequence[str], rng: np.random.Generator) -> Words:
    """With words of the vocabulary in one to three places."""
    for _ in range(_few(rng)):
        words[rng.integers(len(words))] = _word(vocabulary, rng)
    return words


def shuffle(words: Words, vocabulary: Sequence[str], rng: np.random.Generator) -> Words:
    """In another order."""
    return [words[place] for place in rng.permutation(len(words))]


OPERATIONS: tuple[Callable[[Words, Sequence[str], np.random.Generator], Words], ...] = (
    repeat,
    remove,
    insert,
    swap,
    shuffle,
)


def _few(rng: np.random.Generator) -> int:
    return int(rng.integers(1, LARGEST + 1))


def _ngram(words: Words, rng: np.random.Generator) -> tuple[int, int]:
    """(first, behind the last) of one to three words."""
    size = min(_few(rng), len(words))
    start = int(rng.integers(len(words) - size + 1))
    return start, start + size


def _word(vocabulary: Sequence[str], rng: np.random.Generator) -> str:
    return vocabulary[int(rng.integers(len(vocabulary)))]
