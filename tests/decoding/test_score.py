"""Scores of captions against what generation said of them."""

import jax
import jax.numpy as jnp
import numpy as np

from capjax.decoding.generate import generate
from capjax.decoding.score import score
from capjax.mesh import MeshShape, make_mesh, place_batch, place_tree


def test_a_generated_caption_scores_its_log_probability(model, params, images):
    made = generate(model, params, images, max_length=12, temperature=1.0)
    assert not np.all(made.finished_B)  # captions that were cut are scored without an end
    expected = np.asarray(made.logprobs_BL).sum(axis=1)
    scores = score(model, params, images, made.tokens_BL)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    from_patches = score(model, params, model.encode(params, images), made.tokens_BL)
    np.testing.assert_allclose(from_patches, expected, atol=1e-4)

    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    rows = {"image": np.asarray(images), "labels": np.asarray(made.tokens_BL)}
    with jax.set_mesh(mesh):
        batch = place_batch(mesh, rows)
        placed = place_tree(mesh, params, model.param_specs())
        spread = score(model, placed, batch["image"], batch["labels"])
    np.testing.assert_allclose(spread, expected, atol=1e-4)


def test_probabilities_of_all_first_tokens_sum_to_one(model, params, images):
    num = model.config.vocab_size
    first = np.arange(num)  # 1 is the end; 0, padding, cannot be scored but has its probability
    one = jnp.asarray(np.stack([first, np.zeros(num)], axis=1), jnp.int32)
    patches = jnp.repeat(model.encode(params, images[:1]), num, axis=0)
    probabilities = np.exp(np.asarray(score(model, params, patches, one), np.float64))[1:]
    made = generate(model, params, patches[:1], max_length=1)
    logits = model.logits(
        params, model.hidden(params, jnp.zeros((1, 1), jnp.int32), patches[:1], None)
    )
    padding = float(jax.nn.softmax(logits[0, 0])[0])
    np.testing.assert_allclose(probabilities.sum() + padding, 1.0, atol=1e-5)
    np.testing.assert_allclose(probabilities.max(), np.exp(made.logprobs_BL[0, 0]), rtol=1e-5)
