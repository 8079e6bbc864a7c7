"""Agreement of captions with their references, on plain strings.

With several references, each metric of an item is its best over the references (the usual rule for
captions: agreeing with any one person is agreement).
"""

import collections
import re
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"\w+")

References = Sequence[str | Sequence[str]]  # of each item: one reference, or several


def words(text: str) -> list[str]:
    r"""The lower-cased `\w+` words of a caption."""
    return _WORD.findall(text.lower())


def is_exact(prediction: str, reference: str) -> bool:
    """Whether the lower-cased strings are equal. Spaces and punctuation count."""
    return prediction.lower() == reference.lower()


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of word precision and recall, words taken as multisets; 1 if both are empty."""
    predicted, expected = (collections.Counter(words(text)) for text in (prediction, reference))
    total = predicted.total() + expected.total()
    return 2 * (predicted & expected).total() / total if total else 1.0


def exact_match_items(predictions: Sequence[str], references: References) -> np.ndarray:
    """bool [N]: whether each prediction equals one of its references, lower-cased."""
    pairs = _pairs(predictions, references)
    return np.array([any(is_exact(p, r) for r in refs) for p, refs in pairs], bool)


def unigram_f1_items(predictions: Sequence[str], references: References) -> np.ndarray:
    """float64 [N]: the best word F1 of each prediction over its references, in [0, 1]."""
    pairs = _pairs(predictions, references)
    return np.array([max(f1(p, r) for r in refs) for p, refs in pairs], np.float64)


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Share of predictions that equal a reference, lower-cased."""
    return float(exact_match_items(predictions, references).mean())


def unigram_f1(predictions: Sequence[str], references: References) -> float:
    """Word F1, mean over items."""
    return float(unigram_f1_items(predictions, references).mean())


def distinct_ratio(predictions: Sequence[str]) -> float:
    """Different captions (lower-cased) over captions: 1 if all differ, 1/N if all are the same."""
    if not predictions:
        raise ValueError("no captions to measure")
    return len({prediction.lower() for prediction in predictions}) / len(predictions)


def caption_metrics(predictions: Sequence[str], references: References) -> dict[str, float]:
    """`exact_match`, `unigram_f1`, `distinct_ratio` and `num_words` (mean) of the predictions.

    `references[i]` is one string, or several of which the best counts. Raises `ValueError` where
    the lengths differ, where there is nothing to measure or where an item has no reference.
    """
    return {
        "exact_match": exact_match(predictions, references),
        "unigram_f1": unigram_f1(predictions, references),
        "distinct_ratio": distinct_ratio(predictions),
        "num_words": float(np.mean([len(words(prediction)) for prediction in predictions])),
    }


def _pairs(predictions: Sequence[str], references: References) -> list[tuple[str, tuple[str, ...]]]:
    """Predictions beside their references, checked."""
    for name, value in (("predictions", predictions), ("references", references)):
        if isinstance(value, str):
            raise ValueError(f"{name} is one string; expected a list of them")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    if not predictions:
        raise ValueError("no captions to measure")
    listed = [(r,) if isinstance(r, str) else tuple(r) for r in references]
    if not all(listed):
        raise ValueError(f"item {[bool(r) for r in listed].index(False)} has no reference")
    return list(zip(predictions, listed, strict=True))
