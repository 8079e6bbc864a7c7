"""How well images find their captions, and captions their images, in a held-out set.

Letters: N images, M distinct captions, D width of the common space, E pairs of them, R captions of
one image, X an image's number and the ids of a caption.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Int, Params
from capjax.errors import UserError
from capjax.evaluation.every_row import map_rows, of_all_processes
from capjax.evaluation.intervals import intervals, mean_of, values_of
from capjax.evaluation.measured import Measured
from capjax.evaluation.ranking import nearest, rank_pairs
from capjax.mesh import place_batch
from capjax.models.coca import CoCa
from capjax.models.two_towers import TwoTowers
from capjax.objectives.contrastive import sigmoid_loss, softmax_loss

RECALLS = (1, 5, 10)
NO_CAPTIONS = "evaluation: expected captioned examples, found none; check the split"
TIES = "a tie is a miss; *_ties_as_hits says what counting it as a hit would give"


def evaluate_retrieval(
    towers: TwoTowers | CoCa,
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    references: Callable[[int], Int[np.ndarray, "R L"]] | None = None,
    kind: str = "sigmoid",
    max_logit_scale: float = 0.0,
) -> Measured:
    """Retrieval among all rows of `batches` whose `mask` holds and that have a caption.

    Args:
      batches: this process's rows of each global batch: `image`, `tokens`, `index`, `mask`.
      mesh: what the parameters lie on.
      references: all captions of the example of an index, as ids; without it `tokens` are the only
        one. It is asked of this process's rows alone.
      kind: the loss, "sigmoid" or "softmax"; max_logit_scale: as in training, 0 for none.

    Returns what `measure_retrieval` does, without items, of the images that have a caption and the
    distinct captions (those of equal tokens are one caption), and:
      contrastive_loss: the loss without smoothing of images and `tokens` in consecutive batches of
        the same size (the rest left out where there is a whole batch), where equal captions do
        count as negatives. It alone depends on the batches.
      retrieval_images, retrieval_captions: how many there are.

    Every process returns the same. Raises `UserError` where there is no captioned row at all.
    """
    image_ND, first_EX, others_EX, batch_size = _embedded(
        towers, params, batches, mesh, references or (lambda index: np.zeros((0, 0), np.int32))
    )
    first_EX, others_EX = (x[(x[:, 1:] != PAD_ID).sum(1) > 1] for x in (first_EX, others_EX))
    pair_EX = np.concatenate([first_EX, others_EX])
    if not len(pair_EX):
        raise UserError(NO_CAPTIONS)
    used_N, image_E = np.unique(pair_EX[:, 0], return_inverse=True)
    text_ML, text_E = np.unique(pair_EX[:, 1:], axis=0, return_inverse=True)
    image_ND, text_E = image_ND[used_N], text_E.reshape(-1)
    text_MD = map_rows(
        lambda rows: _embed_texts(towers, params, rows["tokens"]),
        {"tokens": text_ML},
        mesh=mesh,
        batch_size=batch_size,
    )
    pairs = np.unique([image_E, text_E], axis=1)
    measured = measure_retrieval(image_ND, text_MD, *pairs, keys=(), mesh=mesh)
    with jax.set_mesh(mesh):
        scale, bias = (float(x) for x in _scale_and_bias(towers, params))
    scale = min(scale, max_logit_scale) if max_logit_scale else scale
    sides = image_ND[image_E[: len(first_EX)]], text_MD[text_E[: len(first_EX)]]
    more = {
        "contrastive_loss": _mean_loss(kind, *sides, scale, bias, batch_size),
        "retrieval_images": float(len(image_ND)),
        "retrieval_captions": float(len(text_MD)),
    }
    return measured._replace(metrics=measured.metrics | more, items={})


def _embedded(
    towers: TwoTowers | CoCa,
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    references: Callable[[int], np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(images [N, D], first captions [N, 1 + L], the others [E, 1 + L], rows of a batch).

    Captions are ids behind the row of their image. Raises `UserError` for no batches.
    """
    parts, own_EX, batch_size = [], [], 0
    for batch in batches:
        rows = {name: batch[name] for name in ("image", "tokens", "index", "mask")}
        placed = place_batch(mesh, rows)
        with jax.set_mesh(mesh):
            image_BD = _embed_images(towers, params, placed["image"])
        beside = (placed["tokens"], placed["index"], placed["mask"])
        *gathered, mask_B = multihost_utils.process_allgather((image_BD, *beside), tiled=True)
        parts.append([x[mask_B] for x in gathered])
        for index in batch["index"][batch["mask"]]:
            own_EX += [np.concatenate([[index], ids_L]) for ids_L in references(int(index))]
        batch_size = len(mask_B)
    if not parts:
        raise UserError(NO_CAPTIONS)
    image_ND, first_NL, index_N = (np.concatenate(x) for x in zip(*parts, strict=True))
    first_NX = np.column_stack([np.arange(len(index_N)), first_NL])
    others_EX = of_all_processes(np.array(own_EX, np.int32).reshape(-1, first_NX.shape[1]))
    order_N = np.argsort(index_N)
    others_EX[:, 0] = order_N[np.searchsorted(index_N, others_EX[:, 0], sorter=order_N)]
    return image_ND, first_NX, others_EX, batch_size


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
def _embed_images(towers: TwoTowers | CoCa, params: Params, images_BHWC: Array) -> Array:
    return towers.embed_image(params, towers.encode(params, images_BHWC))


@functools.partial(jax.jit, static_argnums=0)
def _embed_texts(towers: TwoTowers | CoCa, params: Params, tokens_BL: Array) -> Array:
    return towers.embed_text(params, tokens_BL)


@functools.partial(jax.jit, static_argnums=0)
def _scale_and_bias(towers: TwoTowers | CoCa, params: Params) -> tuple[Array, Array]:
    return towers.logit_scale_and_bias(params)


def _mean_loss(kind: str, image_ND, text_ND, scale: float, bias: float, batch_size: int) -> float:
    if not len(image_ND):
        return math.nan
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
