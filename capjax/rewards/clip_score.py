"""How well captions suit their images, and each other, in the space of two towers.

CLIPScore and RefCLIPScore (Hessel et al. 2021) weigh by 2.5 and prompt texts with "A photo
depicts "; PAC-S (Sarto et al. 2023) is the same with weight 2 and weights of its own. Pure
functions of embeddings of length 1: for reports of NumPy and JAX alike, for rewards of JAX.

Letters: N images with a caption each, E references, D width; of rewards B images, K captions
sampled and R references of each.
"""

import jax
import jax.numpy as jnp
import numpy as np

from capjax.dims import Array, Bool, Float
from capjax.errors import UserError

PROMPT = "A photo depicts "
WEIGHTS = {"clip_score": 2.5, "pac_score": 2.0}
DEFINITIONS = ("hessel", "cho")


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


def clip_score_reward(
    caption_BKD: Float[Array, "B K D"],
    image_BD: Float[Array, "B D"],
    w: float = WEIGHTS["clip_score"],
) -> Float[Array, "B K"]:
    """The `clip_score` of each sampled caption, in [0, w]: the CLIP-S reward of Cho et al. 2022."""
    return w * jnp.maximum(_cosines("bkd,bd->bk", caption_BKD, image_BD), 0)


def ref_clip_score_reward(
    caption_BKD: Float[Array, "B K D"],
    image_BD: Float[Array, "B D"],
    reference_BRD: Float[Array, "B R D"],
    is_reference_BR: Bool[Array, "B R"] | None = None,
    *,
    definition: str = "hessel",
    w: float = WEIGHTS["clip_score"],
) -> Float[Array, "B K"]:
    """The harmonic mean of `clip_score_reward` and the cosine with the nearest reference.

    Args:
      is_reference_BR: False where an image has fewer references than R. An image without any
        scores 0.
      definition: "hessel": the reference's cosine as it is (Hessel et al. 2021, section 3); "cho":
        times w, as the code of Cho et al. 2022 has it.

    Raises `UserError` for another definition.
    """
    if definition not in DEFINITIONS:
        raise UserError(f"definition={definition!r}: choose one of {', '.join(DEFINITIONS)}")
    cosine_BKR = _cosines("bkd,brd->bkr", caption_BKD, reference_BRD)
    if is_reference_BR is not None:
        cosine_BKR = jnp.where(is_reference_BR[:, None], cosine_BKR, 0)
    nearest_BK = jnp.maximum(jnp.max(cosine_BKR, -1), 0)
    if definition == "cho":
        nearest_BK *= w
    return with_references(clip_score_reward(caption_BKD, image_BD, w), nearest_BK)


def _cosines(subscripts: str, left: Array, right: Array) -> Array:
    """Products of float32, in full on accelerators too."""
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return jnp.einsum(subscripts, left, right, precision=jax.lax.Precision.HIGHEST)
