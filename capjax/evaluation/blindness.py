"""Whether a captioner looks at its images, told from the metrics of an evaluation."""

import math
from collections.abc import Mapping

LEAST_GAIN = 0.02  # of the loss with the images of others
LEAST_DISTINCT = 0.05  # different captions, by different references


def blindness(metrics: Mapping[str, float], references_distinct_ratio: float = 1.0) -> str:
    """What is wrong, as a line of warning; empty where nothing is, or the metrics cannot tell.

    Two signs are read. Each caption is scored with its image and with the image of another row
    (`loss`, `shuffled_images_loss`). A model that ignores images gives both the same number, not
    nearly but exactly, whatever the captions are, so hardly any gain is allowed for: a fiftieth of
    the loss. A captioner of the embedded corpus gains 7 % after 400 steps on things it has never
    seen, its worst case, and 43 % on new compositions; a model at its very start gains nothing, so
    an evaluation before training is not to be asked. And a captioner that says one thing of every
    image says few things (`distinct_ratio`). Less than a twentieth of what the references have
    warns; the runs of this repository have from 47 % up. That sign alone leaves the
    likelihood its sight: it is decoding, or a text prior, that goes over it.

    Args:
      metrics: of one split, by the names of `evaluate_likelihood` and `caption_metrics`.
      references_distinct_ratio: different reference captions by images, where many are alike, as
        the names of classes are.
    """
    loss = metrics.get("loss", math.nan)
    shuffled = metrics.get("shuffled_images_loss", math.nan)
    distinct = metrics.get("distinct_ratio", math.nan)
    # A shuffled loss of 0 is that of a batch with a single row, which has no other image.
    is_blind = shuffled > 0 and shuffled - loss < LEAST_GAIN * shuffled
    is_same = distinct < LEAST_DISTINCT * references_distinct_ratio
    if not (is_blind or is_same):
        return ""
    said = f"{distinct:.2%} of the captions are different ones"
    if not is_blind:
        return (
            f"says the same of most images: {said}, though their likelihood depends on the image "
            f"(loss {loss:.3f}, with other images {shuffled:.3f}); try guidance_scale above 1, "
            "and look at captions/"
        )
    told = f"; {said}" if is_same else ""
    return (
        f"ignores its images: captions are as probable with the image of another row "
        f"(loss {loss:.3f}, with other images {shuffled:.3f}{told}); check that images and "
        "captions belong together, and try a smaller learning rate, or parallel_fraction above 0"
    )
