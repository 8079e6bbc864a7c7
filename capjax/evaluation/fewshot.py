"""Few-shot classification of frozen features by least squares, as big_vision's `fewshot_lsr`.

A ridge regression from whitened features onto targets of 1 for the class and -1 for the others,
solved in closed form; in float64 on the host. Letters: N rows, D features, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from capjax.dims import Float, Int
from capjax.errors import UserError

SHOTS = (1, 5, 10, 25)
_BIAS = 100.0  # the constant feature: so large that the bias is hardly regularised


class FewShot(NamedTuple):
    """Class scores of features are [(x - mean) / std, 100] @ weights."""

    weights_DC: np.ndarray  # the last row is the bias'
    mean_D: np.ndarray
    std_D: np.ndarray

    def scores(self, features_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N C"]:
        """How far each class is from -1."""
        return _with_bias((features_ND - self.mean_D) / self.std_D) @ self.weights_DC


def least_squares(
    features_ND: Float[np.ndarray, "N D"],
    labels_N: Int[np.ndarray, " N"],
    num_classes: int,
    l2: float = 2.0**10,
) -> FewShot:
    """The minimum of |X W - Y|^2 + l2 |W|^2. Raises `UserError` for an l2 of 0 or less.

    By an eigendecomposition of X^T X, or of X X^T where rows are fewer than features.
    """
    if l2 <= 0:
        raise UserError(f"l2={l2}: expected a number above 0")
    features_ND = features_ND.astype(np.float64)
    mean_D, std_D = features_ND.mean(0), features_ND.std(0) + 1e-5
    x_ND = _with_bias((features_ND - mean_D) / std_D)
    y_NC = 2 * np.eye(num_classes)[labels_N] - 1
    if x_ND.shape[0] >= x_ND.shape[1]:
        values, vectors = np.linalg.eigh(x_ND.T @ x_ND)
        weights_DC = vectors / (values + l2) @ (vectors.T @ (x_ND.T @ y_NC))
    else:
        values, vectors = np.linalg.eigh(x_ND @ x_ND.T)
        weights_DC = x_ND.T @ (vectors / (values + l2) @ (vectors.T @ y_NC))
    return FewShot(weights_DC, mean_D, std_D)


def draw_shots(
    labels_N: Int[np.ndarray, " N"], num_classes: int, shots: Sequence[int], seed: int
) -> dict[int, Int[np.ndarray, " S"]]:
    """For each number of shots the rows drawn: so many of every class, or all that a class has.

    The rows of fewer shots are among those of more. Raises `UserError` for shots below 1.
    """
    if min(shots, default=1) < 1:
        raise UserError(f"shots={tuple(shots)}: expected numbers from 1 on")
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(np.flatnonzero(labels_N == label)) for label in range(num_classes)]
    return {count: np.concatenate([order[:count] for order in orders]) for count in shots}


def _with_bias(x_ND: np.ndarray) -> np.ndarray:
    return np.pad(x_ND, ((0, 0), (0, 1)), constant_values=_BIAS)
