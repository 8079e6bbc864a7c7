"""The self-retrieval reward: its vectors, distractors in any order, ties."""

import jax.numpy as jnp
import numpy as np

from capjax.rewards.self_retrieval import self_retrieval

COSINES = jnp.array([[0.30, 0.28, 0.20], [0.25, 0.27, 0.27], [0.10, 0.22, 0.31]])
IMAGES = jnp.eye(3)  # the cosines are the captions' coordinates


def test_vectors():
    reward, hit = self_retrieval(COSINES, IMAGES)
    np.testing.assert_allclose(reward, [-0.126968, -0.758624, -0.000123], atol=1e-5)
    np.testing.assert_array_equal(hit, [1, 0, 1])  # the second ties with the third image
    reward, _ = self_retrieval(COSINES, IMAGES, 1.0)
    np.testing.assert_allclose(reward, [-1.059537, -1.091990, -1.002291], atol=1e-6)


def test_distractors_in_any_order():
    rng = np.random.default_rng(0)
    captions, images = jnp.asarray(rng.normal(0, 0.1, (2, 8, 16)), jnp.float32)
    reward, hit = self_retrieval(captions, images)
    order = np.array([0, *1 + rng.permutation(7)])
    other_reward, other_hit = self_retrieval(captions[order], images[order])
    np.testing.assert_allclose(other_reward, reward[order], rtol=1e-5)
    np.testing.assert_array_equal(other_hit, hit[order])


def test_equal_images_are_misses():
    same = jnp.ones((4, 2))
    reward, hit = self_retrieval(same, same, 1.0)
    np.testing.assert_allclose(reward, np.log(0.25), rtol=1e-6)
    assert not hit.any()
