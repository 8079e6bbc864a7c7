"""The reward of a caption that tells its image from the others of a batch.

Gaur et al. 2024, "No Detail Left Behind", and Dessì et al. 2023, "Cross-Domain Image Captioning
with Discriminative Finetuning": a frozen pair of towers reads the caption and must pick its image.

Letters: B images, K captions an image, C the images again as what is picked from, M images more
that were mined for each image, D width.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from capjax.dims import Array, Bool, Float, Int
from capjax.errors import UserError
from capjax.mesh import BATCH, reshard

FORMS = ("log", "accuracy")
TIE = 1e-6  # cosines no further apart are equal: what float32 makes of rows of length 1


def self_retrieval(
    caption_BKD: Float[Array, "B K D"],
    image_BD: Float[Array, "B D"],
    scale: float | Float[Array, ""] = 100.0,
    *,
    form: str = "log",
    bag_B: Int[Array, "B"] | None = None,
    mask_B: Bool[Array, "B"] | None = None,
    index_B: Int[Array, "B"] | None = None,
    negative_BMD: Float[Array, "B M D"] | None = None,
) -> Float[Array, "B K"]:
    """How surely each caption picks its image among those of the global batch.

    Args:
      caption_BKD, image_BD: embeddings of length 1 of towers that are not trained.
      scale: what cosines are multiplied by to be logits: the towers' own (100 for CLIP).
      form: "log": log p(image | caption), at most 0, the reward of both papers; "accuracy": 1 where
        the image alone is most similar, else 0; a tie is a miss.
      bag_B: of each image the number of its bag; the images of other bags are left out.
      mask_B: False for rows that only fill the batch: no caption picks from them, and what they
        themselves get is finite but means nothing.
      index_B: of each image what it is in the source: the same image a second time is no rival.
      negative_BMD: images more to pick from for the captions of each image, such as its nearest
        neighbours in the training set (Dessì et al.); one that is in the batch too counts twice.

    Products are of float32. Raises `UserError` for another form.
    """
    if form not in FORMS:
        raise UserError(f"form={form!r}: choose one of {', '.join(FORMS)}")
    caption_BKD = caption_BKD.astype(jnp.float32)
    cosine_BKC = _cosines("bkd,cd->bkc", caption_BKD, reshard(image_BD, P(None, None)))
    is_own_BC, is_offered_BC = _choices(len(image_BD), bag_B, mask_B, index_B)
    own_BK = jnp.sum(jnp.where(is_own_BC[:, None], cosine_BKC, 0), -1)
    is_rival_BC = is_offered_BC & ~is_own_BC
    rivals_BKC = jnp.where(is_rival_BC[:, None], cosine_BKC, -jnp.inf)
    if negative_BMD is not None:
        negative_BKM = _cosines("bkd,bmd->bkm", caption_BKD, negative_BMD)
        rivals_BKC = jnp.concatenate([rivals_BKC, negative_BKM], -1)
    if form == "accuracy":
        return jnp.astype(own_BK > jnp.max(rivals_BKC, -1) + TIE, jnp.float32)
    return -jax.nn.softplus(jax.nn.logsumexp(scale * (rivals_BKC - own_BK[..., None]), -1))


def _cosines(subscripts: str, caption_BKD: Array, image: Array) -> Array:
    return jnp.einsum(
        subscripts, caption_BKD, image.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def _choices(
    size: int, bag_B: Array | None, mask_B: Array | None, index_B: Array | None
) -> tuple[Array, Array]:
    """bool [B, C]: whether the image is the row's own, and whether it may be picked from."""
    place_C = jnp.arange(size)
    is_own_BC = reshard(place_C[:, None] == place_C[None], P(BATCH, None))
    is_offered_BC = jnp.ones_like(is_own_BC)
    if bag_B is not None:
        is_offered_BC &= bag_B[:, None] == reshard(bag_B, P(None))[None]
    if mask_B is not None:
        is_offered_BC &= reshard(mask_B, P(None))[None]
    if index_B is not None:
        is_offered_BC &= index_B[:, None] != reshard(index_B, P(None))[None]
    return is_own_BC, is_offered_BC
