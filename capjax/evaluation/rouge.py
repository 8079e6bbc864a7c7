"""ROUGE-L of tokenised captions, as the COCO caption evaluation computes it.

Lin, 2004: the longest common subsequence of a caption and a reference. The best precision and the
best recall over the references are taken apart, and recall weighs BETA times as much.
"""

from collections.abc import Sequence

import numpy as np

BETA = 1.2

Tokens = Sequence[str]


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """float64 [N], in [0, 1]. An empty caption scores 0."""
    return np.array(
        [_score(ours, refs) for ours, refs in zip(candidates, references, strict=True)], np.float64
    )


def _score(ours: Tokens, references: Sequence[Tokens]) -> float:
    common = [longest_common(ours, reference) for reference in references]
    precision = max(common) / max(1, len(ours))
    recall = max(n / max(1, len(refs)) for n, refs in zip(common, references, strict=True))
    if not precision:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(left: Tokens, right: Tokens) -> int:
    """Length of the longest common subsequence.

    A row of the usual table is one integer: a zero bit where the length grows (Hyyrö, 2004).
    """
    places: dict[str, int] = {}
    for place, token in enumerate(left):
        places[token] = places.get(token, 0) | 1 << place
    full = (1 << len(left)) - 1
    row = full
    for token in right:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(left) - row.bit_count()
