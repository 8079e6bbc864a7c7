"""k nearest neighbours against the same in plain NumPy."""

import numpy as np
import pytest

from capjax.errors import UserError
from capjax.evaluation import knn
from capjax.evaluation.knn import knn_scores
from tests.evaluation.tiny import EIGHT, ONE

NUM_CLASSES = 4
RNG = np.random.default_rng(0)
TRAIN_ND, TEST_MD = RNG.normal(size=(50, 6)), 3 * RNG.normal(size=(21, 6))
LABELS_N = RNG.integers(0, NUM_CLASSES - 1, 50)  # the last class has no row


def plain(k, temperature):
    """A row, a neighbour after the other."""
    scores = np.zeros((len(TEST_MD), NUM_CLASSES))
    for row, test_D in enumerate(TEST_MD):
        norms = np.linalg.norm(TRAIN_ND, axis=1) * np.linalg.norm(test_D)
        cosines = TRAIN_ND @ test_D / norms
        for neighbour in np.argsort(-cosines)[:k]:
            scores[row, LABELS_N[neighbour]] += np.exp(cosines[neighbour] / temperature)
    return scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one", "eight"])
def test_as_one_row_after_the_other(mesh, monkeypatch):
    for block, k in ((1024, 7), (8, 7), (8, 20)):
        monkeypatch.setattr(knn, "BLOCK", block)
        found = knn_scores(
            TRAIN_ND, LABELS_N, TEST_MD, NUM_CLASSES, mesh=mesh, k=k, temperature=0.2, batch_size=8
        )
        np.testing.assert_allclose(found, plain(k, 0.2), rtol=1e-4, atol=1e-6)


def test_with_few_training_rows_all_vote():
    found = knn_scores(TRAIN_ND, LABELS_N, TEST_MD, NUM_CLASSES, mesh=ONE, k=80, temperature=0.2)
    np.testing.assert_allclose(found, plain(50, 0.2), rtol=1e-4, atol=1e-6)


def test_of_equal_neighbours_the_first_vote_in_any_block(monkeypatch):
    labels_N = np.array([2, 2, 0] + [1] * 61)
    for block in (2, 64):
        monkeypatch.setattr(knn, "BLOCK", block)
        found = knn_scores(np.ones((64, 2)), labels_N, np.ones((1, 2)), 3, mesh=ONE, k=2)
        np.testing.assert_array_equal(found, [[0, 0, 1]])


def test_wrong_settings():
    for fields in ({"k": 0}, {"temperature": 0.0}):
        with pytest.raises(UserError, match="expected at least 1, and above 0"):
            knn_scores(TRAIN_ND, LABELS_N, TEST_MD, NUM_CLASSES, mesh=ONE, **fields)
