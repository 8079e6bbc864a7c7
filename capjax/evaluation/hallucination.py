"""What captions mention that is not there: CHAIR, and the same with any lexicon.

CHAIR (Rohrbach et al. 2018, "Object Hallucination in Image Captioning") counts as there what the
image's annotations name and what its reference captions mention.
"""

from collections.abc import Sequence

import numpy as np

from capjax.evaluation.intervals import Statistic, intervals, mean_of, share_of, values_of
from capjax.evaluation.lexicon import Lexicon, mentions
from capjax.evaluation.measured import Measured

NOTHING = "no caption mentions anything of the lexicon"


def measure_hallucination(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    lexicon: Lexicon,
    *,
    keys: Sequence[str],
    objects: Sequence[Sequence[str]] | None = None,
) -> Measured:
    """Mentions that nothing supports, and what there is and goes unmentioned.

    Args:
      references: of each caption's image; objects: names of what its annotations hold, in the
        words of the lexicon.

    Metrics, all of the whole set's counts:
      chair_i: mentions of what is not there / mentions.
      chair_s: captions with such a mention / captions.
      mention_precision: 1 - chair_i; mention_recall: things there that are mentioned / things
        there.
      <kind>_precision, <kind>_recall: the same for each kind of the lexicon, if there are several.
    Items: num_mentions, num_hallucinated, chair_s. What has nothing to count is skipped, with the
    reason. Raises `ValueError` where the lengths differ.
    """
    objects = [()] * len(captions) if objects is None else objects
    kinds = sorted(set(lexicon.kinds.values()))
    counts = {kind: np.zeros((len(captions), 4), np.int64) for kind in kinds}
    for row, (caption, texts, names) in enumerate(zip(captions, references, objects, strict=True)):
        there = {name for text in (*texts, *names) for name in mentions(text, lexicon)}
        said = mentions(caption, lexicon)
        for kind in kinds:
            said_K = [name for name in said if lexicon.kinds[name] == kind]
            there_K = {name for name in there if lexicon.kinds[name] == kind}
            wrong = sum(name not in there_K for name in said_K)
            counts[kind][row] = len(said_K), wrong, len(there_K & {*said_K}), len(there_K)
    total_N4 = sum(counts.values(), np.zeros((len(captions), 4), np.int64))
    shares, skipped = _shares("mention", total_N4)
    if len(kinds) > 1:
        for kind, count_N4 in counts.items():
            found, missing = _shares(kind, count_N4)
            shares, skipped = shares | found, skipped | missing
    hallucinates_N = total_N4[:, 1] > 0
    if "mention_precision" in shares:
        shares["chair_i"] = share_of(total_N4[:, 1], total_N4[:, 0])
    else:
        skipped["chair_i"] = NOTHING
    shares["chair_s"] = mean_of(hallucinates_N)
    return Measured(
        values_of(shares),
        {
            "num_mentions": total_N4[:, 0],
            "num_hallucinated": total_N4[:, 1],
            "chair_s": hallucinates_N.astype(float),
        },
        tuple(keys),
        intervals(shares),
        skipped,
    )


def _shares(name: str, counts_N4: np.ndarray) -> tuple[dict[str, Statistic], dict[str, str]]:
    """Precision and recall, and why there is none."""
    said_N, wrong_N, right_N, there_N = counts_N4.T
    shares, skipped = {}, {}
    if said_N.any():
        shares[f"{name}_precision"] = share_of(said_N - wrong_N, said_N)
    else:
        skipped[f"{name}_precision"] = NOTHING
    if there_N.any():
        shares[f"{name}_recall"] = share_of(right_N, there_N)
    else:
        skipped[f"{name}_recall"] = "nothing of the lexicon is there"
    return shares, skipped
