"""How well images find their captions, and captions their images, in a held-out set.

Letters: N images, M distinct captions, D width of the common space, E pairs of them.
"""

import functools
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Params
from capjax.errors import UserError
from capjax.evaluation.intervals import intervals, mean_of, values_of
from capjax.evaluation.measured import Measured
from capjax.evaluation.ranking import nearest, rank_best_pairs, rank_pairs
from capjax.mesh import place_batch
from capjax.models.coca import CoCa
from capjax.models.two_towers import TwoTowers
from capjax.objectives.contrastive import sigmoid_loss, softmax_loss

RECALLS = (1, 5, 10)
TIES = "a tie is a miss; *_ties_as_hits says what counting it as a hit would give"


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
    image_rank_N, text_rank_M = ranks(image_ND, text_ND[first_M], caption_N.reshape(-1), mesh)
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
    image_ND: np.ndarray, text_MD: np.ndarray, caption_N: np.ndarray, mesh: Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(the rank of each image's caption among the M, the best rank of each caption's images).

    `caption_N` names each image's caption by its row in `text_MD`; every caption has an image.
    """
    image_N = np.arange(len(image_ND))
    images = rank_pairs(image_ND, text_MD, image_N, caption_N, mesh)
    texts = rank_best_pairs(text_MD, image_ND, caption_N, image_N, mesh)
    return 1 + images.better_E, 1 + texts.better_E


def measure_retrieval(
    image_ND: np.ndarray,
    text_MD: np.ndarray,
    image_E: np.ndarray,
    text_E: np.ndarray,
    *,
    keys: Sequence[str],
    texts: Sequence[str] | None = None,
    mesh: Mesh | None = None,
) -> Measured:
    """Retrieval both ways where an image has any number of captions, and a caption of images.

    Args:
      image_E, text_E: the pairs that belong together, as rows of the embeddings, each pair once.
        Every image and every text is in one at least.
      keys: of the images; texts: of the rows of `text_MD`, for the wrong neighbours.

    Returns, for `image_to_text` and `text_to_image`:
      _r1, _r5, _r10: the share of the queries with any of theirs among the first k. What belongs to
        the query does not stand in its way, and a tie with anything else is a miss.
      _r1_ties_as_hits: recall at 1 if a tie were a hit; _tie_rate: the share of the queries whose
        best is as similar as something that is not theirs.
      _r_precision, _map_at_r: of a query with R of its own, the share of them among the first R,
        and the mean over these R places of the precision so far where the place is one of its own,
        else 0 (Musgrave et al. 2020).
    Items, one an image: image_to_text_rank, and with `texts` image_to_text_nearest: the most
    similar text that is not its own.
    """
    ways = {
        "image_to_text": (image_ND, text_MD, image_E, text_E),
        "text_to_image": (text_MD, image_ND, text_E, image_E),
    }
    metrics, bounds, ranks_of = {}, {}, {}
    for way, (queries_ND, targets_MD, query_E, target_E) in ways.items():
        ranking = rank_pairs(queries_ND, targets_MD, query_E, target_E, mesh)
        rank_N = 1 + _least(ranking.better_E, query_E, len(queries_ND))
        lenient_N = 1 + _least(ranking.strictly_E, query_E, len(queries_ND))
        precision_N, average_N = precision_at_r(ranking.better_E, query_E, len(queries_ND))
        ranks_of[way] = rank_N
        shares = {f"{way}_r{k}": mean_of(rank_N <= k) for k in RECALLS} | {
            f"{way}_r1_ties_as_hits": mean_of(lenient_N <= 1),
            f"{way}_tie_rate": mean_of(lenient_N < rank_N),
            f"{way}_r_precision": mean_of(precision_N),
            f"{way}_map_at_r": mean_of(average_N),
        }
        metrics |= values_of(shares)
        bounds |= intervals(shares)  # of images, or of texts, drawn again
    items: dict[str, np.ndarray] = {"image_to_text_rank": ranks_of["image_to_text"]}
    if texts is not None:
        wrong_N = nearest_wrong(image_ND, text_MD, image_E, text_E, mesh)
        names = [texts[wrong] if wrong >= 0 else "" for wrong in wrong_N]
        items["image_to_text_nearest"] = np.array(names, object)
    return Measured(metrics, items, tuple(keys), bounds, notes={"retrieval_ties": TIES})


def precision_at_r(
    better_E: np.ndarray, query_E: np.ndarray, num_queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """(R-Precision, mAP@R) of each query, from how many wrong targets its own are behind."""
    order_E = np.lexsort((better_E, query_E))
    own_N = np.bincount(query_E, minlength=num_queries)
    starts_N = np.cumsum(own_N) - own_N
    query_E, better_E = query_E[order_E], better_E[order_E]
    number_E = 1 + np.arange(len(query_E)) - starts_N[query_E]  # the first, second, ... of its own
    place_E = number_E + better_E
    is_in_E = place_E <= own_N[query_E]
    precision_N = np.bincount(query_E, is_in_E, num_queries) / own_N
    average_N = np.bincount(query_E, is_in_E * number_E / place_E, num_queries) / own_N
    return precision_N, average_N


def nearest_wrong(
    queries_ND: np.ndarray,
    targets_MD: np.ndarray,
    query_E: np.ndarray,
    target_E: np.ndarray,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """The most similar target of each query that is not its own; -1 where all are."""
    most = np.bincount(query_E).max()
    _, index_NK = nearest(queries_ND, targets_MD, int(min(most + 1, len(targets_MD))), mesh)
    own_of: list[set[int]] = [set() for _ in queries_ND]
    for query, target in zip(query_E.tolist(), target_E.tolist(), strict=True):
        own_of[query].add(target)
    return np.array(
        [
            next((index for index in row if index not in own), -1)
            for row, own in zip(index_NK.tolist(), own_of, strict=True)
        ]
    )


def _least(values_E: np.ndarray, group_E: np.ndarray, num_groups: int) -> np.ndarray:
    """The least value of each group."""
    least_N = np.full(num_groups, np.iinfo(np.int64).max)
    np.minimum.at(least_N, group_E, values_E)
    return least_N


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
