"""CLIPScore and its kin: published vectors, signs, what is a mean of what."""

import jax.numpy as jnp
import numpy as np

from capjax.rewards.clip_score import WEIGHTS, clip_score, reference_score, with_references


def at_cosine(*cosines):
    """Rows of length 1 at these cosines to the first axis."""
    return np.array([[c, np.sqrt(1 - c * c)] for c in cosines])


AXIS = np.array([[1.0, 0.0]])


def test_vectors():
    cosines = at_cosine(0.3, -0.4, 0.0, 1.0)
    expected = [0.75, 0, 0, 2.5]
    np.testing.assert_allclose(clip_score(AXIS, cosines), expected, atol=1e-12)
    np.testing.assert_allclose(clip_score(jnp.asarray(AXIS), jnp.asarray(cosines)), expected)
    assert np.isclose(clip_score(AXIS, cosines, WEIGHTS["pac_score"])[0], 0.6)  # 2 x 0.3
    assert np.isclose(with_references(np.array(0.75), np.array(0.8)), 0.774194, atol=1e-6)
    np.testing.assert_array_equal(with_references(np.zeros(2), np.array([0.7, 0])), [0, 0])


def test_the_best_reference_counts_unscaled():
    captions = np.repeat(AXIS, 3, 0)
    references = at_cosine(0.2, 0.8, -0.5)
    best = reference_score(captions, references, np.array([0, 0, 2]))
    np.testing.assert_allclose(best, [0.8, np.nan, 0], atol=1e-7)


def test_the_mean_of_harmonic_means_is_not_that_of_means():
    score, reference = np.array([0.9, 0.1]), np.array([0.1, 0.9])
    assert np.isclose(with_references(score, reference).mean(), 0.18)
    assert np.isclose(with_references(score.mean(), reference.mean()), 0.5)
