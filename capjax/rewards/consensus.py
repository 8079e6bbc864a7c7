"""CIDEr-D and CIDEr: how far captions agree with what people wrote, on the host.

Vedantam, Zitnick and Parikh, CVPR 2015. A caption is a sequence of tokens: words, or ids (subwords
give another metric, to be called by another name). N-grams are counted with NumPy over all captions
at once, and the document frequencies may come from elsewhere: a reward must weigh the n-grams of a
small batch as the whole training set does.
"""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

MAX_ORDER = 4  # n-grams of one to four tokens
SIGMA = 6.0  # standard deviation of the penalty for a difference in length, in tokens

Tokens = Sequence[Hashable]


class DocumentFrequencies(NamedTuple):
    """In how many images' references each n-gram occurs.

    words: the id of each token.
    keys: for each order n, sorted: (place of the first n-1 tokens in the keys before) times
      len(words), plus the id of the last token.
    counts: for each order n, the images that hold the n-gram, in the order of `keys`.
    num_documents: images.
    """

    words: dict[Hashable, int]
    keys: tuple[np.ndarray, ...]
    counts: tuple[np.ndarray, ...]
    num_documents: int


class _Ngrams(NamedTuple):
    """The n-grams of one order, by position: what stands there and in which sentence.

    ids: places in `keys`.
    keys: of the different n-grams, as in `DocumentFrequencies`.
    """

    ids: np.ndarray
    sentences: np.ndarray
    keys: np.ndarray


def document_frequencies(references: Sequence[Sequence[Tokens]]) -> DocumentFrequencies:
    """Counts the n-grams of `references`: of each image, its reference captions.

    Raises `ValueError` where there is no image.
    """
    if not references:
        raise ValueError("no references: expected those of at least one image")
    image_of = np.repeat(np.arange(len(references)), [len(captions) for captions in references])
    words, orders = _count(list(itertools.chain.from_iterable(references)))
    counts = []
    for ngrams in orders:
        held = np.unique(image_of[ngrams.sentences] * len(ngrams.keys) + ngrams.ids)
        counts.append(np.bincount(held % max(1, len(ngrams.keys)), minlength=len(ngrams.keys)))
    keys = tuple(ngrams.keys for ngrams in orders)
    return DocumentFrequencies(words, keys, tuple(counts), len(references))


def cider_d(
    candidates: Sequence[Tokens],
    references: Sequence[Sequence[Tokens]],
    frequencies: DocumentFrequencies | None = None,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """CIDEr-D of each candidate, in [0, 10]: what the field's tools print as CIDEr.

    Args:
      candidates: N captions.
      references: of each image, at least one caption.
      frequencies: of the n-grams; default: those of `references`.
      rows: int [N], the place in `references` of each candidate's image; default: its own place.

    Returns float64 [N]. A set of one image scores 0: each of its n-grams is in every image.
    Raises `ValueError` where candidates and references do not match.
    """
    return _consensus(candidates, references, frequencies, rows, is_clipped=True)


def cider(
    candidates: Sequence[Tokens],
    references: Sequence[Sequence[Tokens]],
    frequencies: DocumentFrequencies | None = None,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """`cider_d` without its two guards, clipped counts and the penalty for length: plain CIDEr."""
    return _consensus(candidates, references, frequencies, rows, is_clipped=False)


def similarity(
    sentences: Sequence[Tokens],
    left: np.ndarray,
    right: np.ndarray,
    frequencies: DocumentFrequencies,
    *,
    is_clipped: bool,
) -> np.ndarray:
    """float64 [P], in [0, 1]: weighted n-gram cosines of pairs of sentences, mean over n.

    Args:
      left, right: int [P], places in `sentences`: of the candidates, and of their references.
      is_clipped: as CIDEr-D: an n-gram of the left counts at most as often as on the right, and
        differing lengths cost exp(-(difference)^2 / (2 SIGMA^2)); else plain cosines.
    """
    words, orders = _count(sentences)
    lengths = np.array([max(len(tokens) - 1, 0) for tokens in sentences], np.int64)
    total = np.zeros(len(left))
    for ngrams, idf in zip(orders, _weights(words, orders, frequencies), strict=True):
        total += _cosines(ngrams, idf, left, right, len(sentences), is_clipped)
    if is_clipped:
        total *= np.exp(-((lengths[left] - lengths[right]) ** 2) / (2 * SIGMA**2))
    return total / MAX_ORDER


def _consensus(candidates, references, frequencies, rows, *, is_clipped: bool) -> np.ndarray:
    """Ten times the mean similarity of each candidate to its image's references."""
    rows = np.arange(len(references)) if rows is None else np.asarray(rows, np.int64)
    if len(rows) != len(candidates):
        raise ValueError(f"{len(candidates)} candidates for the references of {len(rows)} images")
    counts = np.array([len(captions) for captions in references], np.int64)
    if not counts.all():
        raise ValueError(f"image {int(np.argmin(counts))} has no reference")
    if frequencies is None:
        frequencies = document_frequencies(references)
    sentences = [*candidates, *itertools.chain.from_iterable(references)]
    left = np.repeat(np.arange(len(candidates)), counts[rows])
    first = len(candidates) + np.cumsum(counts) - counts
    right = _ranges(first[rows], counts[rows])
    similar = similarity(sentences, left, right, frequencies, is_clipped=is_clipped)
    return 10 * np.bincount(left, similar, len(candidates)) / counts[rows]


def _count(sentences: Sequence[Tokens]) -> tuple[dict[Hashable, int], list[_Ngrams]]:
    """The id of every token that occurs, and the n-grams of each order."""
    if any(isinstance(tokens, str) for tokens in sentences):
        raise ValueError("a caption is one string; expected its tokens, such as text.split()")
    words: dict[Hashable, int] = {}
    flat: Iterable[Hashable] = itertools.chain.from_iterable(sentences)
    ids = np.fromiter((words.setdefault(word, len(words)) for word in flat), np.int64)
    lengths = np.array([len(tokens) for tokens in sentences], np.int64)
    sentence = np.repeat(np.arange(len(sentences)), lengths)
    left = lengths[sentence] - _ranges(np.zeros_like(lengths), lengths)  # tokens to the end
    orders = [_Ngrams(ids, sentence, np.arange(len(words)))]
    prefix, starts = ids, np.arange(len(ids))
    for order in range(2, MAX_ORDER + 1):
        goes_on = left[starts] >= order
        starts = starts[goes_on]
        keys, prefix = np.unique(
            prefix[goes_on] * len(words) + ids[starts + order - 1], return_inverse=True
        )
        orders.append(_Ngrams(prefix, sentence[starts], keys))
    return words, orders


def _weights(
    words: dict[Hashable, int], orders: list[_Ngrams], frequencies: DocumentFrequencies
) -> list[np.ndarray]:
    """For each order, log(images / images that hold it) of every n-gram in its `keys`."""
    # Places in the tables of `frequencies`, -1 for what they lack.
    word_at = np.array([frequencies.words.get(word, -1) for word in words], np.int64)
    place, weights = word_at, []
    for order, (ngrams, counts) in enumerate(zip(orders, frequencies.counts, strict=True)):
        if order:
            first, last = np.divmod(ngrams.keys, max(1, len(words)))
            first, last = place[first], word_at[last]
            wanted = np.where((first < 0) | (last < 0), -1, first * len(frequencies.words) + last)
            place = _find(frequencies.keys[order], wanted)
        held = np.append(counts, 1)[place]
        weights.append(np.log(frequencies.num_documents) - np.log(np.maximum(1, held)))
    return weights


def _cosines(
    ngrams: _Ngrams,
    idf: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    num_sentences: int,
    is_clipped: bool,
) -> np.ndarray:
    """The cosines of one order: sum of min(l, r) r (clipped) or l r, over the norms."""
    size = max(1, len(ngrams.keys))
    entries, counts = np.unique(ngrams.sentences * size + ngrams.ids, return_counts=True)
    sentence, ngram = np.divmod(entries, size)
    values = counts * idf[ngram]
    norms = np.sqrt(np.bincount(sentence, values**2, num_sentences))
    per_sentence = np.bincount(sentence, minlength=num_sentences)
    first = np.cumsum(per_sentence) - per_sentence
    pair = np.repeat(np.arange(len(left)), per_sentence[left])
    of_left = _ranges(first[left], per_sentence[left])
    of_right = _find(entries, right[pair] * size + ngram[of_left])
    found = of_right >= 0
    pair, ours, theirs = pair[found], values[of_left[found]], values[of_right[found]]
    shared = (np.minimum(ours, theirs) if is_clipped else ours) * theirs
    dots = np.bincount(pair, shared, len(left))
    scale = norms[left] * norms[right]
    return np.divide(dots, scale, out=np.zeros(len(left)), where=scale > 0)


def _ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... (counts[0] of them), first[1], ..."""
    ends = np.cumsum(counts)
    return np.arange(counts.sum()) + np.repeat(first - (ends - counts), counts)


def _find(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The place of each wanted value in a sorted table; -1 where it is not there."""
    if not len(table):
        return np.full(len(wanted), -1)
    place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return np.where(table[place] == wanted, place, -1)
