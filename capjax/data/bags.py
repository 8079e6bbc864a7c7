"""Bags: small sets of images much alike, in which a caption must name what sets its image apart.

Bags are made of any features (embeddings of images, of texts, or both side by side), after the
curriculum of Gaur et al. 2024 ("No Detail Left Behind"): greedily, from the images that have the
nearest neighbours on. They are the same on every machine: features are rounded to a grid on which
products are exact.

Letters: N images, D width.
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from capjax.errors import UserError

DUPLICATE = 0.98  # a cosine above which two images are too much alike to tell apart
GRID = 2.0**20  # steps to a feature of 1; sums of products of such numbers are exact in float64
BLOCK = 512  # images compared with all others at a time


def build_bags(
    features_ND: np.ndarray,
    size: int,
    *,
    duplicate: float = DUPLICATE,
    min_similarity: float = -1.0,
    same_N: Sequence[str] | None = None,
) -> list[list[int]]:
    """Disjoint bags of `size` rows, the tightest first; each bag's first row is its anchor.

    Rows become anchors in descending order of the mean cosine with their `size` - 1 nearest; of
    equals the first goes first. An anchor that is in no bag yet takes the nearest rows that are in
    none and are no near-duplicate (cosine above `duplicate`) of it or of one taken. One that finds
    fewer than it needs with a cosine of `min_similarity` at least makes no bag. With `same_N`, such
    as the images' references, rows of equal entries count as near-duplicates too.

    Time grows with N^2, memory with N. Raises `UserError` for a size below 2, and for features that
    are not finite or vanish.
    """
    if size < 2:
        raise UserError(f"size={size}: a bag takes at least 2 images")
    unit_ND = _on_grid(features_ND)
    if len(unit_ND) < size:
        return []
    group_N = np.arange(len(unit_ND))
    if same_N is not None:
        group_N = np.unique(np.asarray(same_N), return_inverse=True)[1]
    used_N = np.zeros(len(unit_ND), bool)
    bags = []
    for anchor in np.argsort(-_tightness(unit_ND, group_N, size - 1, duplicate), kind="stable"):
        if used_N[anchor]:
            continue
        used_N[anchor] = True  # from here on it is in this bag or, without one, still free
        bag = _bag(unit_ND, group_N, int(anchor), size, used_N, duplicate, min_similarity)
        used_N[bag] = len(bag) == size
        if len(bag) == size:
            bags.append(bag)
    return bags


def _bag(
    unit_ND, group_N, anchor: int, size: int, used_N, duplicate: float, least: float
) -> list[int]:
    """The anchor and the nearest rows that may join it, up to `size` in all."""
    cosine_N = unit_ND @ unit_ND[anchor]
    may_join_N = ~used_N & (cosine_N >= least)
    bag = [anchor]
    while True:
        alike_N = (unit_ND @ unit_ND[bag[-1]] > duplicate) | (group_N == group_N[bag[-1]])
        may_join_N &= ~alike_N
        if len(bag) == size or not may_join_N.any():
            return bag
        bag.append(int(np.argmax(np.where(may_join_N, cosine_N, -np.inf))))


def _tightness(unit_ND: np.ndarray, group_N, count: int, duplicate: float) -> np.ndarray:
    """The mean cosine of each row with its `count` nearest that are no near-duplicates."""
    mean_N = np.empty(len(unit_ND))
    for start in range(0, len(unit_ND), BLOCK):
        rows = slice(start, start + BLOCK)
        cosine_RN = unit_ND[rows] @ unit_ND.T
        cosine_RN[(cosine_RN > duplicate) | (group_N[rows, None] == group_N)] = -1.0
        nearest_RK = np.partition(cosine_RN, -count, axis=1)[:, -count:]
        mean_N[rows] = np.sort(nearest_RK, axis=1).mean(1)
    return mean_N


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
