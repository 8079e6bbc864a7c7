"""Bags: small sets of images much alike, in which a caption must name what sets its image apart.

Bags are made of any features (embeddings of images, of texts, or both side by side), after the
curriculum of Gaur et al. 2024 ("No Detail Left Behind"): greedily, from the images that have the
nearest neighbours on. They are the same on every machine: features are rounded to a grid on which
products are exact.

Letters: N images, D width, K neighbours of an image, R images of a block.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from capjax.data.stream import example_index
from capjax.errors import UserError

DUPLICATE = 0.98  # a cosine above which two images are too much alike to tell apart
GRID = 2.0**20  # steps to a feature of 1; sums of products of such numbers are exact in float64
BLOCK = 256  # images compared with all others at a time
NEIGHBOURS = 32  # of an image that are kept; where they do not do, all images are looked through


class _Neighbours(NamedTuple):
    """The nearest rows of each that are no near-duplicates of it.

    cosine_NK: exact, -inf where there is none; outside_N: what the cosines of all others that are
    no near-duplicates do not exceed, -inf where there are no others.
    """

    index_NK: np.ndarray
    cosine_NK: np.ndarray
    outside_N: np.ndarray


class _Images(NamedTuple):
    """What bags are made of: rows of length 1 on the grid, what is the same by name, the limit."""

    unit_ND: np.ndarray
    group_N: np.ndarray
    duplicate: float

    def cosines(self, rows_R: np.ndarray, others: np.ndarray | slice) -> np.ndarray:
        """Of rows with others; -inf where they are near-duplicates."""
        cosine = self.unit_ND[rows_R] @ self.unit_ND[others].T
        is_same = self.group_N[rows_R, None] == self.group_N[others]
        return np.where((cosine > self.duplicate) | is_same, -np.inf, cosine)


def build_bags(features_ND: np.ndarray, size: int, **options: Any) -> list[list[int]]:
    """`build_bags_of_sizes` of one size."""
    return build_bags_of_sizes(features_ND, [size], **options)[size]


def build_bags_of_sizes(
    features_ND: np.ndarray,
    sizes: Sequence[int],
    *,
    duplicate: float = DUPLICATE,
    min_similarity: float = -1.0,
    same_N: Sequence[str] | None = None,
) -> dict[int, list[list[int]]]:
    """Disjoint bags of `size` rows, the tightest first; each bag's first row is its anchor.

    Rows become anchors in descending order of the mean cosine with their `size` - 1 nearest; of
    equals the first goes first. An anchor that is in no bag yet takes the nearest rows that are in
    none and are no near-duplicate (cosine above `duplicate`) of it or of one taken. One that finds
    fewer than it needs with a cosine of `min_similarity` at least makes no bag. With `same_N`, such
    as the images' references, rows of equal entries count as near-duplicates too.

    Returns the bags of each of the sizes, which share the search for neighbours. Its time grows
    with N^2, memory with N. Raises `UserError` for a size below 2, and for features that are not
    finite or vanish.
    """
    if too_small := [size for size in sizes if size < 2]:
        raise UserError(f"size={too_small[0]}: a bag takes at least 2 images")
    unit_ND = _on_grid(features_ND)
    group_N = np.arange(len(unit_ND))
    if same_N is not None:
        group_N = np.unique(np.asarray(same_N), return_inverse=True)[1]
    images = _Images(unit_ND, group_N, duplicate)
    possible = [size for size in sizes if size <= len(unit_ND)]
    if not possible:
        return {size: [] for size in sizes}
    near = _neighbours(images, min(len(unit_ND), max(NEIGHBOURS, 2 * max(possible))))
    return {
        size: _bags(images, near, size, min_similarity) if size in possible else []
        for size in sizes
    }


def random_bags(
    count: int, size: int, *, seed: int, same_N: Sequence[str] | None = None
) -> list[list[int]]:
    """Disjoint bags of `size` of `count` rows by chance, for comparison with bags of like ones.

    Rows of equal entries in `same_N` do not share a bag. Less than a bag is left over, or rows
    which are all the same. Raises `UserError` for a size below 2.
    """
    if size < 2:
        raise UserError(f"size={size}: a bag takes at least 2 images")
    same = range(count) if same_N is None else same_N
    waiting = deque(example_index(seed, position, count) for position in range(count))
    bags = []
    while True:
        bag, passed = {}, []
        while waiting and len(bag) < size:
            row = waiting.popleft()
            if same[row] in bag:
                passed.append(row)
            else:
                bag[same[row]] = row
        if len(bag) < size:
            return bags
        bags.append(list(bag.values()))
        waiting.extendleft(reversed(passed))


def _bags(images: _Images, near: _Neighbours, size: int, least: float) -> list[list[int]]:
    used_N = np.zeros(len(images.unit_ND), bool)
    bags = []
    for anchor in np.argsort(-_tightness(images, near, size - 1), kind="stable").tolist():
        if used_N[anchor]:
            continue
        used_N[anchor] = True  # from here on it is in this bag or, without one, still free
        bag = _bag(images, near, anchor, size, used_N, least)
        used_N[bag] = len(bag) == size
        if len(bag) == size:
            bags.append(bag)
    return bags


def _bag(
    images: _Images, near: _Neighbours, anchor: int, size: int, used_N: np.ndarray, least: float
) -> list[int]:
    """The anchor and the nearest rows that may join it, up to `size` in all."""
    index_K, cosine_K = near.index_NK[anchor], near.cosine_NK[anchor]
    outside = near.outside_N[anchor]
    is_known_K = ~used_N[index_K] & (cosine_K > outside) & (cosine_K >= least)
    bag = _fill(images, anchor, size, index_K[is_known_K], cosine_K[is_known_K])
    if len(bag) == size or outside < least:
        return bag
    free = np.flatnonzero(~used_N)
    cosine = images.cosines(np.array([anchor]), free)[0]
    may_join = cosine >= least
    return _fill(images, anchor, size, free[may_join], cosine[may_join])


def _fill(
    images: _Images, anchor: int, size: int, rows: np.ndarray, cosine: np.ndarray
) -> list[int]:
    """The anchor and the first of the rows, by cosine, that are not like one before them."""
    bag = [anchor]
    for row in rows[np.lexsort((rows, -cosine))].tolist():
        if np.isfinite(images.cosines(np.array([row]), np.array(bag))).all():
            bag.append(row)
            if len(bag) == size:
                break
    return bag


def _tightness(images: _Images, near: _Neighbours, count: int) -> np.ndarray:
    """The mean cosine of each row with its `count` nearest that are no near-duplicates."""
    nearest_NK = np.sort(near.cosine_NK, axis=1)[:, -count:]
    is_unsure_N = (nearest_NK[:, 0] <= near.outside_N) & np.isfinite(near.outside_N)
    unsure = np.flatnonzero(is_unsure_N)
    for start in range(0, len(unsure), BLOCK):
        rows_R = unsure[start : start + BLOCK]
        cosine_RN = images.cosines(rows_R, slice(None))
        nearest_NK[rows_R] = np.sort(np.partition(cosine_RN, -count, axis=1)[:, -count:], axis=1)
    return np.where(np.isfinite(nearest_NK), nearest_NK, -1.0).mean(1)


def _neighbours(images: _Images, count: int) -> _Neighbours:
    """Found in float32, whose error is bounded, then exactly."""
    unit_ND, group_N, duplicate = images
    rough_ND = unit_ND.astype(np.float32)  # exact, as the grid is of 21 bits
    margin = unit_ND.shape[1] * 2.0**-23  # twice the error of a sum of so many products (Higham)
    parts = []
    for start in range(0, len(unit_ND), BLOCK):
        rows = slice(start, start + BLOCK)
        rough_RN = rough_ND[rows] @ rough_ND.T
        is_alike_RN = (rough_RN > duplicate + margin) | (group_N[rows, None] == group_N)
        rough_RN[is_alike_RN] = -np.inf
        index_RK = np.argpartition(rough_RN, -count, axis=1)[:, -count:]
        rough_RK = np.take_along_axis(rough_RN, index_RK, 1)
        cosine_RK = (unit_ND[index_RK] @ unit_ND[rows, :, None])[..., 0]
        cosine_RK[np.isneginf(rough_RK) | (cosine_RK > duplicate)] = -np.inf
        outside_R = rough_RK.min(1).astype(np.float64) + margin
        if count == len(unit_ND):
            outside_R[:] = -np.inf
        parts.append((index_RK.astype(np.int32), cosine_RK, outside_R))
    return _Neighbours(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def _on_grid(features_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1, rounded."""
    features_ND = np.asarray(features_ND, np.float64)
    length_N = np.sqrt((features_ND**2).sum(-1))
    wrong_N = ~np.isfinite(length_N) | (length_N == 0)
    if wrong_N.any():
        raise UserError(
            f"features: row {int(np.argmax(wrong_N))} is not finite or vanishes; leave such images "
            "out, or check the checkpoint that made them"
        )
    return np.round(features_ND / length_N[:, None] * GRID) / GRID


def write_bags(path: epath.PathLike, bags: Sequence[Sequence[int]], keys: Sequence[str]) -> None:
    """Writes bags of rows as TrueMatch does: a JSON list of lists of the images' ids.

    `keys` are those of the rows; where all are whole numbers, as in COCO, numbers are written.
    """
    is_number = all(key.isdecimal() and str(int(key)) == key for key in keys)
    named = [[int(keys[row]) if is_number else keys[row] for row in bag] for bag in bags]
    epath.Path(path).write_text(json.dumps(named) + "\n")


def read_bags(path: epath.PathLike, names: Mapping[str, str] | None = None) -> list[list[str]]:
    """The bags of a file in TrueMatch's form, as lists of keys.

    `names` gives the key of an id where they differ. Raises `UserError` where the file holds
    something else, where a bag has an image twice, or where bags differ in size.
    """
    try:
        bags = [[str(image) for image in bag] for bag in json.loads(epath.Path(path).read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: expected a JSON list of lists of image ids ({type(error).__name__}: {error})"
        ) from error
    if names is not None:
        bags = [[names.get(image, image) for image in bag] for bag in bags]
    if any(len(set(bag)) != len(bags[0]) or len(bag) != len(bags[0]) for bag in bags):
        raise UserError(f"{path}: expected bags of one size, of different images each")
    return bags
