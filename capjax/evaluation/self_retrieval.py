"""Do captions tell their images from others? The image that a caption retrieves.

A caption made for an image is good at this if a judge, two towers that had no part in making it,
finds the image by it: among all of the set (recall at k), among 99 random others (RD100), in bags
of images much alike (TrueMatch), or among ten frames of a film (ImageCoDe). Protocols of Gaur et
al. 2024 ("No Detail Left Behind") and Krojer et al. 2022 ("Image Retrieval from Contextual
Descriptions"). A tie is a miss, so that captions all alike find nothing; what counting ties as hits
would give stands beside it.

Letters: N images and their captions, D width, G groups of J images.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from capjax.errors import UserError
from capjax.evaluation.intervals import Statistic, intervals, mean_of, share_of, values_of
from capjax.evaluation.measured import Measured
from capjax.evaluation.ranking import group_similarities, rank_pairs
from capjax.evaluation.retrieval import RECALLS, TIES, nearest_wrong

NUM_DISTRACTORS = 99
NUM_SHUFFLES = 5
PAIRS_AT_ONCE = 2**15  # embeddings of groups compared at a time


def caption_to_image(
    caption_ND: np.ndarray, image_ND: np.ndarray, keys: Sequence[str], mesh: Mesh | None = None
) -> Measured:
    """Each caption against all images.

    Metrics: caption_to_image_r1, _r5, _r10, _r1_ties_as_hits, _tie_rate (the share of the captions
    that are as similar to another image as to theirs) and _median_rank, which has no interval.
    Items: caption_to_image_rank, and nearest_key: the most similar image that is not the caption's.
    """
    row_N = np.arange(len(caption_ND))
    ranking = rank_pairs(caption_ND, image_ND, row_N, row_N, mesh)
    rank_N = 1 + ranking.better_E
    wrong_N = nearest_wrong(caption_ND, image_ND, row_N, row_N, mesh)
    name = "caption_to_image"
    shares = {f"{name}_r{k}": mean_of(rank_N <= k) for k in RECALLS} | {
        f"{name}_r1_ties_as_hits": mean_of(ranking.strictly_E == 0),
        f"{name}_tie_rate": mean_of(ranking.strictly_E < ranking.better_E),
    }
    return Measured(
        values_of(shares) | {f"{name}_median_rank": float(np.median(rank_N))},
        {
            f"{name}_rank": rank_N,
            "nearest_key": np.array([keys[i] if i >= 0 else "" for i in wrong_N], object),
        },
        tuple(keys),
        intervals(shares),
        notes={"self_retrieval_ties": TIES},
    )


def random_distractors(
    caption_ND: np.ndarray,
    image_ND: np.ndarray,
    keys: Sequence[str],
    *,
    seed: int = 0,
    num_shuffles: int = NUM_SHUFFLES,
) -> Measured:
    """RD100: each caption against its image and 99 random others, over several fixed shuffles.

    A shuffle is cut into hundreds; a rest is filled up from the shuffle's beginning, and those that
    fill it up do not count again. Metrics: rd100_r1, the mean over the shuffles `seed`, `seed` + 1,
    ..., and rd100_r1_ties_as_hits. Items: rd100_r1, the share of the shuffles in which a caption
    hit. Skipped, with the reason, where there are fewer than 100 images.
    """
    size, total = NUM_DISTRACTORS + 1, len(caption_ND)
    if total < size:
        reason = f"{total} images: random distractors take at least {size}"
        return Measured({}, skipped={"rd100_r1": reason})
    hits_SN, lenient_SN = np.zeros((2, num_shuffles, total), bool)
    for shuffle in range(num_shuffles):
        order = np.random.default_rng(seed + shuffle).permutation(total)
        groups_GJ = np.resize(order, (-(-total // size), size))
        hit_GJ, lenient_GJ = _hits_in_groups(caption_ND, image_ND, groups_GJ)
        hits_SN[shuffle, order] = hit_GJ.reshape(-1)[:total]
        lenient_SN[shuffle, order] = lenient_GJ.reshape(-1)[:total]
    of_all_N = np.full(total, num_shuffles)
    shares = {
        "rd100_r1": share_of(hits_SN.sum(0), of_all_N),
        "rd100_r1_ties_as_hits": share_of(lenient_SN.sum(0), of_all_N),
    }
    return Measured(
        values_of(shares),
        {"rd100_r1": hits_SN.mean(0)},
        tuple(keys),
        intervals(shares),
        notes={
            "rd100_seeds": [seed, seed + num_shuffles - 1],
            "rd100_deviation_over_seeds": float(hits_SN.mean(1).std()),
        },
    )


def bags(
    caption_ND: np.ndarray,
    image_ND: np.ndarray,
    keys: Sequence[str],
    bags_of: Mapping[int, Sequence[Sequence[str]]],
) -> Measured:
    """Each caption against the images of its bag (TrueMatch).

    `bags_of` has the bags of each size, as `capjax.data.bags` builds and reads them: lists of keys.
    Metrics for each size: bags_<size>_r1, the mean over all captions of all bags, _r1_ties_as_hits,
    _count (of bags). Items, where bags are disjoint: bags_<size>_r1. Skipped, with the reason, for
    a size without bags. Raises `UserError` where a bag holds a key that was not captioned, or one
    image twice.
    """
    row_of = {key: row for row, key in enumerate(keys)}
    shares: dict[str, Statistic] = {}
    counts, items, skipped = {}, {}, {}
    for size, found in bags_of.items():
        name = f"bags_{size}"
        if not found:
            skipped[f"{name}_r1"] = "no bags of this size"
            continue
        groups_GJ = np.array([_rows_of_bag(bag, size, row_of) for bag in found])
        hit_GJ, lenient_GJ = _hits_in_groups(caption_ND, image_ND, groups_GJ)
        if len(np.unique(groups_GJ)) == groups_GJ.size:
            items[f"{name}_r1"] = np.full(len(keys), np.nan)
            items[f"{name}_r1"][groups_GJ] = hit_GJ
        total, in_bags_N = len(keys), np.bincount(groups_GJ.ravel(), minlength=len(keys))
        for metric, of_bags_GJ in (("r1", hit_GJ), ("r1_ties_as_hits", lenient_GJ)):
            hits_N = np.bincount(groups_GJ.ravel(), of_bags_GJ.ravel(), total)
            shares[f"{name}_{metric}"] = share_of(hits_N, in_bags_N)
        counts[f"{name}_count"] = float(len(found))
    return Measured(
        values_of(shares) | counts,
        items,
        tuple(keys) if items else (),
        intervals(shares),
        skipped,
    )


def among_candidates(
    caption_GD: np.ndarray, candidates_GJD: np.ndarray, target_G: np.ndarray, keys: Sequence[str]
) -> Measured:
    """ImageCoDe: each caption against the candidates of its own, such as ten frames of a film.

    Metrics: imagecode_r1, imagecode_r1_ties_as_hits; items: imagecode_r1.
    """
    similarity_GJ = group_similarities(caption_GD[:, None], candidates_GJD)[:, 0]
    hit_G, lenient_G = _hits(similarity_GJ, target_G)
    shares = {"imagecode_r1": mean_of(hit_G), "imagecode_r1_ties_as_hits": mean_of(lenient_G)}
    return Measured(
        values_of(shares), {"imagecode_r1": hit_G.astype(float)}, tuple(keys), intervals(shares)
    )


def _rows_of_bag(bag: Sequence[str], size: int, row_of: Mapping[str, int]) -> list[int]:
    if unknown := [key for key in bag if key not in row_of]:
        raise UserError(
            f"bag {list(bag)}: no caption for {unknown}; caption all the images that the bags "
            "name, or build bags of those you have"
        )
    if len(set(bag)) != size or len(bag) != size:
        raise UserError(f"bag {list(bag)}: expected {size} different images")
    return [row_of[key] for key in bag]


def _hits_in_groups(
    caption_ND: np.ndarray, image_ND: np.ndarray, groups_GJ: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(first alone, first or tied) bool [G, J]: each caption among the images of its group."""
    num_groups, size = groups_GJ.shape
    step = max(1, PAIRS_AT_ONCE // size)
    parts = []
    for start in range(0, num_groups, step):
        rows_GJ = np.resize(groups_GJ[start : start + step], (min(step, num_groups), size))
        similarity_GJJ = group_similarities(caption_ND[rows_GJ], image_ND[rows_GJ])
        target_GJ = np.broadcast_to(np.arange(size), rows_GJ.shape)
        parts.append(_hits(similarity_GJJ, target_GJ))
    hit_GJ, lenient_GJ = (np.concatenate(x)[:num_groups] for x in zip(*parts, strict=True))
    return hit_GJ, lenient_GJ


def _hits(similarity_J: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the target alone is most similar, nothing is more similar), over the last axis."""
    own_1 = np.take_along_axis(similarity_J, target[..., None], -1)
    return (similarity_J >= own_1).sum(-1) == 1, (similarity_J > own_1).sum(-1) == 0
