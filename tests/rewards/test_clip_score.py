"""CLIPScore and its kin: published vectors, signs, what is a mean of what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch
from capjax.rewards.clip_score import (
    WEIGHTS,
    clip_score,
    clip_score_reward,
    ref_clip_score_reward,
    reference_score,
    with_references,
)


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


def test_the_reward_is_the_score_of_each_caption():
    images = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
    captions = jnp.stack([jnp.asarray(at_cosine(0.3, -0.4)), jnp.asarray(at_cosine(0.0, 0.6))])
    found = clip_score_reward(captions, images)
    np.testing.assert_allclose(found, [[0.75, 0], [2.5, 2.0]], rtol=1e-6)
    np.testing.assert_allclose(clip_score_reward(captions, images, 2.0)[0], [0.6, 0], rtol=1e-6)


@pytest.mark.parametrize(("definition", "expected"), [("hessel", 0.774194), ("cho", 1.090909)])
def test_both_published_definitions_with_references(definition, expected):
    # The image and the references on either side of the caption, at cosines 0.3 and 0.8, 0.5.
    image = jnp.asarray([[0.3, -np.sqrt(1 - 0.09)]])
    references = jnp.asarray(at_cosine(0.5, 0.8, 1.0))[None]
    captions = jnp.asarray([[[1.0, 0.0], [0.0, 1.0]]])  # the second is opposed to the image
    is_reference = jnp.asarray([[True, True, False]])
    found = ref_clip_score_reward(captions, image, references, is_reference, definition=definition)
    np.testing.assert_allclose(found, [[expected, 0]], atol=1e-6)
    none = ref_clip_score_reward(captions, image, references, ~is_reference & False)
    np.testing.assert_array_equal(none, 0)


def test_rewards_on_eight_devices_as_the_scores_of_reports():
    rng = np.random.default_rng(0)
    rows = {
        name: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
        for name, shape in {"caption": (8, 2, 6), "image": (8, 6), "reference": (8, 3, 6)}.items()
        for x in [rng.normal(size=shape)]
    }
    score = np.stack([clip_score(rows["image"], rows["caption"][:, k]) for k in range(2)], 1)
    nearest = np.stack(
        [
            reference_score(
                rows["caption"][:, k], rows["reference"].reshape(24, 6), np.arange(24) // 3
            )
            for k in range(2)
        ],
        1,
    )
    mesh = make_mesh(MeshShape(data=8))
    with jax.set_mesh(mesh):
        batch = place_batch(mesh, rows)
        found = jax.jit(ref_clip_score_reward)(batch["caption"], batch["image"], batch["reference"])
        np.testing.assert_allclose(found, with_references(score, nearest), atol=1e-6)


def test_another_definition_is_refused():
    with pytest.raises(UserError, match=r"definition='mean': choose one of hessel, cho"):
        ref_clip_score_reward(
            *(jnp.ones(s) for s in [(1, 1, 2), (1, 2), (1, 1, 2)]), definition="mean"
        )
