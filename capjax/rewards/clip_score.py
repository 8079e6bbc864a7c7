"""How well captions suit their images, and each other, in the space of two towers.

CLIPScore and RefCLIPScore (Hessel et al. 2021) weigh by 2.5 and prompt texts with "A photo
depicts "; PAC-S (Sarto et al. 2023) is the same with weight 2 and weights of its own. Pure
functions of embeddings of length 1, for NumPy and JAX alike.

Letters: N images with a caption each, E references, D width.
"""

import numpy as np

PROMPT = "A photo depicts "
WEIGHTS = {"clip_score": 2.5, "pac_score": 2.0}


def clip_score(image_ND, caption_ND, w: float = WEIGHTS["clip_score"]):
    """float32 [N]: w max(cos(image, caption), 0)."""
    return w * (image_ND * caption_ND).sum(-1).clip(0)


def reference_score(caption_ND, reference_ED, caption_E) -> np.ndarray:
    """float32 [N]: the largest cosine with one of the caption's references, 0 at least.

    `caption_E` names each reference's caption by its row. NaN where a caption has no reference.
    """
    best_N = np.full(len(caption_ND), np.nan, np.float32)
    np.fmax.at(best_N, caption_E, clip_score(caption_ND[caption_E], reference_ED, 1.0))
    return best_N


def with_references(score_N, reference_N):
    """float32 [N]: the harmonic mean of the score and that of the references; 0 where one is 0."""
    total_N = score_N + reference_N
    return 2 * score_N * reference_N / (total_N + (total_N == 0))
