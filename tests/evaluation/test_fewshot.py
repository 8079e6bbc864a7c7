"""Least squares: the vector of the specification, the normal equations, the draws."""

import numpy as np
import pytest

from capjax.errors import UserError
from capjax.evaluation.fewshot import draw_shots, least_squares

X = np.array([[0.0, 1], [1, 0], [1, 1], [3, 2]])
Y = np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("l2", "first", "second"), [(1.0, 0.35173, 0.383104), (1024.0, 0.002671, 0.002745)]
)
def test_the_weights_of_a_written_problem(l2, first, second):
    expected = [[-first, first], [-second, second], [0, 0]]
    np.testing.assert_allclose(least_squares(X, Y, 2, l2).weights_DC, expected, atol=1e-6)


@pytest.mark.parametrize("num_rows", [5, 40])
def test_the_gradient_vanishes(num_rows):
    """With fewer rows than features and with more, which are solved in different ways."""
    rng = np.random.default_rng(0)
    x_ND, labels_N = rng.normal(size=(num_rows, 9)), rng.integers(0, 3, num_rows)
    solved = least_squares(x_ND, labels_N, 3, 4.0)
    white_ND = (x_ND - x_ND.mean(0)) / (x_ND.std(0) + 1e-5)
    white_ND = np.concatenate([white_ND, np.full((num_rows, 1), 100.0)], 1)
    residual_NC = white_ND @ solved.weights_DC - np.where(np.eye(3)[labels_N] == 1, 1, -1)
    gradient_DC = white_ND.T @ residual_NC + 4.0 * solved.weights_DC
    np.testing.assert_allclose(gradient_DC, 0, atol=1e-8)
    np.testing.assert_allclose(solved.scores(x_ND), white_ND @ solved.weights_DC)


def test_draws():
    labels_N = np.array([0, 1, 0, 0, 2, 1, 0, 1])
    drawn = draw_shots(labels_N, 4, (1, 3), seed=0)
    for count, expected in ((1, [1, 1, 1, 0]), (3, [3, 3, 1, 0])):
        assert len(set(drawn[count].tolist())) == sum(expected)
        np.testing.assert_array_equal(np.bincount(labels_N[drawn[count]], minlength=4), expected)
    assert set(drawn[1]) < set(drawn[3])
    draws = [tuple(draw_shots(labels_N, 4, (1,), seed)[1]) for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1] and len(set(draws)) > 1


def test_wrong_settings():
    with pytest.raises(UserError, match="l2=0"):
        least_squares(X, Y, 2, 0.0)
    with pytest.raises(UserError, match="shots=\\(0, 5\\)"):
        draw_shots(Y, 2, (0, 5), 0)
