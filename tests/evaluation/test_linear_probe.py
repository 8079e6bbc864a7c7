"""The linear probe against optima that are known, and how its penalty is chosen."""

import jax
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.evaluation.linear_probe import fit, held_out_rows, split_rows, train_linear_probe
from tests.evaluation.tiny import EIGHT, ONE

# One shape for all tests: one program a mesh.
NUM_ROWS, WIDTH, NUM_CLASSES = 126, 8, 3
RNG = np.random.default_rng(1)
X_ND = RNG.normal(size=(NUM_ROWS, WIDTH)).astype(np.float32)
Y_N = np.digitize(X_ND[:, 0] + 0.7 * RNG.normal(size=NUM_ROWS), (-0.5, 0.5))
UNITS = [str(i) for i in range(NUM_ROWS)]


def fitted(mesh, x_ND, labels_N, penalty, is_used_N=True):
    targets_NC = np.eye(NUM_CLASSES)[labels_N] * np.reshape(is_used_N, (-1, 1))
    return jax.device_get(
        fit(mesh, split_rows(mesh, x_ND), split_rows(mesh, targets_NC), penalty, 200)
    )


def softmax(x):
    exponents = np.exp(x - x.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one", "eight"])
def test_without_penalty_cells_get_their_shares(mesh):
    """Features that say a row's cell: the optimum is each cell's share of the classes."""
    cells_N = np.arange(NUM_ROWS) % 3
    counts = np.array([[20, 12, 10], [2, 30, 10], [14, 14, 14]])
    labels_N = np.zeros(NUM_ROWS, int)
    for cell in range(3):
        labels_N[cells_N == cell] = np.repeat(np.arange(3), counts[cell])
    kernel_DC, bias_C = fitted(mesh, np.eye(WIDTH)[cells_N], labels_N, 0.0)
    np.testing.assert_allclose(softmax(kernel_DC + bias_C)[:3], counts / 42, atol=1e-4)


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one", "eight"])
def test_with_penalty_the_gradient_vanishes(mesh):
    is_used_N = np.arange(NUM_ROWS) % 5 > 0  # the others do not count
    x_ND, targets_NC = X_ND[is_used_N], np.eye(NUM_CLASSES)[Y_N[is_used_N]]
    for penalty in (1.0, 1e-3):
        kernel_DC, bias_C = fitted(mesh, X_ND, Y_N, penalty, is_used_N)
        error_NC = (softmax(x_ND @ kernel_DC + bias_C) - targets_NC) / len(x_ND)
        np.testing.assert_allclose(x_ND.T @ error_NC + penalty * kernel_DC, 0, atol=1e-5)
        np.testing.assert_allclose(error_NC.sum(0), 0, atol=1e-5)  # the bias is free


def test_the_penalty_is_the_best_of_the_rows_held_out():
    penalties = (10.0, 0.1, 1e-4)
    probe = train_linear_probe(X_ND, Y_N, 3, mesh=ONE, units=UNITS, penalties=penalties)
    is_held_N = held_out_rows(UNITS, 0.2)
    assert 15 < is_held_N.sum() < 40
    white_ND = (X_ND - X_ND.mean(0)) / X_ND.std(0)
    for penalty in penalties:
        kernel_DC, bias_C = fitted(ONE, white_ND, Y_N, penalty, ~is_held_N)
        predicted_N = (white_ND @ kernel_DC + bias_C)[is_held_N].argmax(1)
        expected = (predicted_N == Y_N[is_held_N]).mean()
        assert probe.held_out_top1[penalty] == pytest.approx(expected, abs=1e-6)
    assert probe.held_out_top1[probe.penalty] == max(probe.held_out_top1.values())
    assert len(set(probe.held_out_top1.values())) > 1
    kernel_DC, bias_C = fitted(ONE, white_ND, Y_N, probe.penalty)  # of all rows
    np.testing.assert_allclose(probe.scores(X_ND), white_ND @ kernel_DC + bias_C, atol=5e-3)


def test_of_equally_good_penalties_the_strongest():
    labels_N = np.arange(NUM_ROWS) % 3
    x_ND = np.eye(WIDTH, dtype=np.float32)[labels_N]
    probe = train_linear_probe(
        x_ND, labels_N, 3, mesh=ONE, units=UNITS, penalties=(1e-3, 0.1, 0.01)
    )
    assert set(probe.held_out_top1.values()) == {1.0} and probe.penalty == 0.1


def test_what_shows_the_same_is_held_out_together():
    units = [str(i // 2) for i in range(1000)]
    is_held_N = held_out_rows(units, 0.2)
    np.testing.assert_array_equal(is_held_N[::2], is_held_N[1::2])
    assert 150 < is_held_N.sum() < 250


def test_wrong_settings():
    x_ND, labels_N = np.eye(4, dtype=np.float32), np.arange(4)
    with pytest.raises(UserError, match="expected some, 0 or more"):
        train_linear_probe(x_ND, labels_N, 4, mesh=ONE, units=list("abcd"), penalties=(-1.0,))
    with pytest.raises(UserError, match="of 1 different training examples"):
        train_linear_probe(x_ND, labels_N, 4, mesh=ONE, units=["a"] * 4)
