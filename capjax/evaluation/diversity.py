"""How much the several captions of one image differ from one another, on tokens.

Wang and Chan, CVPR 2019 (self-CIDEr); Shetty et al., ICCV 2017 (Div-n, mBLEU).
"""

from collections.abc import Sequence

import numpy as np

from capjax.evaluation import bleu
from capjax.rewards import consensus

Tokens = Sequence[str]


def distinct_ngrams(captions: Sequence[Tokens], order: int) -> float:
    """Div-n of one image: different n-grams of its captions over all their words; NaN for none."""
    total = sum(len(tokens) for tokens in captions)
    grams = {
        tuple(tokens[start : start + order])
        for tokens in captions
        for start in range(len(tokens) - order + 1)
    }
    return len(grams) / total if total else np.nan


def mutual_bleu(captions: Sequence[Tokens]) -> np.ndarray:
    """[4], in [0, 1]: BLEU-1 to 4 of each caption against the image's others, mean; lower differs.

    NaN where the image has one caption.
    """
    if len(captions) < 2:
        return np.full(bleu.MAX_ORDER, np.nan)
    others = [[*captions[:i], *captions[i + 1 :]] for i in range(len(captions))]
    return bleu.bleu(bleu.counts(captions, others)).mean(0)


def self_cider(
    images: Sequence[Sequence[Tokens]], frequencies: consensus.DocumentFrequencies
) -> np.ndarray:
    """float64 [N], in [0, 1]: 0 where an image's captions are the same, 1 where they share nothing.

    -log_m(sqrt(largest) / sum of sqrt) of the eigenvalues of the m captions' plain CIDEr with one
    another. NaN where an image has one caption, or captions without an n-gram that weighs.
    """
    sentences = [tokens for captions in images for tokens in captions]
    left, right, first = [], [], 0
    for captions in images:
        here = np.arange(first, first + len(captions))
        left.append(np.repeat(here, len(here)))
        right.append(np.tile(here, len(here)))
        first += len(captions)
    pairs = consensus.similarity(
        sentences, np.concatenate(left), np.concatenate(right), frequencies, is_clipped=False
    )
    ends = np.cumsum([len(captions) ** 2 for captions in images])
    return np.array([_spread(kernel) for kernel in np.split(pairs, ends[:-1])])


def _spread(kernel: np.ndarray) -> float:
    """Self-CIDEr of the m x m similarities of one image's captions, given flat."""
    size = round(len(kernel) ** 0.5)
    if size < 2:
        return np.nan
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(kernel.reshape(size, size)), 0.0))
    if not roots.sum():
        return np.nan
    return float(-np.log(roots.max() / roots.sum()) / np.log(size))
