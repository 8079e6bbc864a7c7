"""BLEU-1 to BLEU-4 of tokenised captions, as the COCO caption evaluation computes them.

Papineni et al., ACL 2002: n-gram matches clipped by the most that one reference holds, and a
penalty for being shorter than the references, of which the nearest in length counts. The counts of
the items are kept apart, so that any resampling of a set can be scored.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

MAX_ORDER = 4
_TINY, _SMALL = 1e-15, 1e-9  # as in the reference code: without a match BLEU is near 0, not 0

Tokens = Sequence[str]


def counts(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """float64 [N, 10]: matched n-grams (n = 1..4), n-grams, the length, its references' length.

    The last is the length nearest to the candidate's, of two equally near the shorter.
    """
    rows = [_row(ours, refs) for ours, refs in zip(candidates, references, strict=True)]
    return np.array(rows, np.float64).reshape(len(rows), 2 * MAX_ORDER + 2)


def bleu(sums: np.ndarray) -> np.ndarray:
    """[..., 4], in [0, 1]: BLEU-1 to BLEU-4 of one item's counts, or of their sums over a set."""
    matched, guessed = sums[..., :MAX_ORDER], sums[..., MAX_ORDER : 2 * MAX_ORDER]
    precisions = np.cumprod((matched + _TINY) / (guessed + _SMALL), axis=-1)
    scores = precisions ** (1 / np.arange(1, MAX_ORDER + 1))
    ratio = (sums[..., -2:-1] + _TINY) / (sums[..., -1:] + _SMALL)
    return scores * np.exp(1 - 1 / np.minimum(ratio, 1.0))


def _row(ours: Tokens, references: Sequence[Tokens]) -> list[int]:
    matched, guessed = [], []
    for order in range(1, MAX_ORDER + 1):
        held = [_ngrams(reference, order) for reference in references]
        found = _ngrams(ours, order)
        matched.append(sum(min(n, max(ref[gram] for ref in held)) for gram, n in found.items()))
        guessed.append(max(0, len(ours) - order + 1))
    _, nearest = min((abs(len(refs) - len(ours)), len(refs)) for refs in references)
    return [*matched, *guessed, len(ours), nearest]


def _ngrams(tokens: Tokens, order: int) -> Counter:
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))
