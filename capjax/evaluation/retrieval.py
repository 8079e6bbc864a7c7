"""How well images find their captions, and captions their images, in a held-out set.

Letters: N images, M distinct captions, D width of the common space.
"""

import functools
from collections.abc import Iterable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Params
from capjax.errors import UserError
from capjax.mesh import place_batch
from capjax.models.coca import CoCa
from capjax.models.two_towers import TwoTowers
from capjax.objectives.contrastive import sigmoid_loss, softmax_loss

RECALLS = (1, 5, 10)
BLOCK = 1024  # images compared at a time


def evaluate_retrieval(
    towers: TwoTowers | CoCa,
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    kind: str = "sigmoid",
    max_logit_scale: float = 0.0,
) -> dict[str, float]:
    """Retrieval among all rows of `batches` whose `mask` holds and that have a caption.

    Args:
      batches: this process's rows of each global batch: `image`, `tokens`, `mask`.
      mesh: what the parameters lie on.
      kind: the loss, "sigmoid" or "softmax"; max_logit_scale: as in training, 0 for none.

    Returns:
      image_to_text_r1, _r5, _r10: the share of the images whose caption is among the first 1, 5, 10
        of the distinct captions. Captions of equal tokens are one caption.
      text_to_image_r1, ...: the share of the distinct captions that find an image of theirs among
        the first 1, 5, 10 of the images. Images of the same caption do not stand in its way.
      contrastive_loss: the loss without smoothing in consecutive batches of the same size (the rest
        left out where there is a whole batch), where equal captions do count as negatives. It alone
        depends on the batches.
      retrieval_images, retrieval_captions: N and M.

    A tie is a miss: an item's rank is 1 + how many others are as similar or more. Every process
    returns the same. Raises `UserError` where there is no captioned row at all.
    """
    parts, batch_size = [], 0
    for batch in batches:
        placed = place_batch(mesh, {name: batch[name] for name in ("image", "tokens", "mask")})
        with jax.set_mesh(mesh):
            embeddings = _embed(towers, params, placed["image"], placed["tokens"])
        image_BD, text_BD, tokens_BL, mask_B = multihost_utils.process_allgather(
            (*embeddings, placed["tokens"], placed["mask"]), tiled=True
        )
        kept_B = mask_B & ((tokens_BL != PAD_ID).sum(1) > 1)  # an end alone is no caption
        parts.append((image_BD[kept_B], text_BD[kept_B], tokens_BL[kept_B]))
        batch_size = len(mask_B)
    if not any(len(image_ND) for image_ND, _, _ in parts):
        raise UserError("evaluation: expected captioned examples, found none; check the split")
    image_ND, text_ND, tokens_NL = (np.concatenate(x) for x in zip(*parts, strict=True))
    _, first_M, caption_N = np.unique(tokens_NL, axis=0, return_index=True, return_inverse=True)
    image_rank_N, text_rank_M = ranks(image_ND, text_ND[first_M], caption_N.reshape(-1))
    metrics = {f"image_to_text_r{k}": float((image_rank_N <= k).mean()) for k in RECALLS}
    metrics |= {f"text_to_image_r{k}": float((text_rank_M <= k).mean()) for k in RECALLS}
    with jax.set_mesh(mesh):
        scale, bias = (float(x) for x in _scale_and_bias(towers, params))
    scale = min(scale, max_logit_scale) if max_logit_scale else scale
    return metrics | {
        "contrastive_loss": _mean_loss(kind, image_ND, text_ND, scale, bias, batch_size),
        "retrieval_images": float(len(image_ND)),
        "retrieval_captions": float(len(first_M)),
    }


def ranks(
    image_ND: np.ndarray, text_MD: np.ndarray, caption_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(the rank of each image's caption among the M, the best rank of each caption's images).

    `caption_N` names each image's caption by its row in `text_MD`; every caption has an image.
    Similarities are computed in float64 and rounded to float32, so that equal pairs are equal.
    """
    image_ND, text_MD = image_ND.astype(np.float64), text_MD.astype(np.float64)
    own_N = np.einsum("nd,nd->n", image_ND, text_MD[caption_N]).astype(np.float32)
    best_M = np.full(len(text_MD), -np.inf, np.float32)
    np.maximum.at(best_M, caption_N, own_N)
    image_rank_N, text_rank_M = np.ones(len(image_ND), np.int64), np.ones(len(text_MD), np.int64)
    for start in range(0, len(image_ND), BLOCK):
        rows = slice(start, start + BLOCK)
        similarity_NM = (image_ND[rows] @ text_MD.T).astype(np.float32)
        is_other_NM = caption_N[rows, None] != np.arange(len(text_MD))[None, :]
        image_rank_N[rows] += (is_other_NM & (similarity_NM >= own_N[rows, None])).sum(1)
        text_rank_M += (is_other_NM & (similarity_NM >= best_M[None, :])).sum(0)
    return image_rank_N, text_rank_M


@functools.partial(jax.jit, static_argnums=0)
def _embed(towers: TwoTowers | CoCa, params: Params, images_BHWC, tokens_BL) -> tuple[Array, Array]:
    memory_BPD = towers.encode(params, images_BHWC)
    return towers.embed_image(params, memory_BPD), towers.embed_text(params, tokens_BL)


@functools.partial(jax.jit, static_argnums=0)
def _scale_and_bias(towers: TwoTowers | CoCa, params: Params) -> tuple[Array, Array]:
    return towers.logit_scale_and_bias(params)


def _mean_loss(kind: str, image_ND, text_ND, scale: float, bias: float, batch_size: int) -> float:
    size = min(batch_size, len(image_ND))
    starts = range(0, len(image_ND) - size + 1, size)
    losses = [
        float(
            _loss(kind, image_ND[start : start + size], text_ND[start : start + size], scale, bias)
        )
        for start in starts
    ]
    return sum(losses) / len(losses)


@functools.partial(jax.jit, static_argnums=0)
def _loss(kind: str, image_BD, text_BD, scale, bias) -> Array:
    text_BKD = text_BD[:, None, :]
    if kind == "softmax":
        return softmax_loss(image_BD, text_BKD, scale)[0]
    return sigmoid_loss(image_BD, text_BKD, scale, bias)[0]
