"""Decoder inputs, the drawing of modes, and the loss on a tiny captioner."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.mesh import MeshShape, act_B, make_mesh
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.objectives.captioning import (
    captioning_loss,
    decoder_inputs,
    draw_parallel,
    mean_caption_loss,
)
from capjax.objectives.metrics import reduce_metrics

VOCAB_SIZE = 40
MODEL = Captioner(
    CaptionerConfig(
        image_size=8,
        patch_size=4,
        width=16,
        depth=1,
        num_heads=2,
        mlp_dim=32,
        vocab_size=VOCAB_SIZE,
        text_length=5,
    )
)


def batch(num_rows=8):
    rng = np.random.default_rng(0)
    lengths_B = 1 + np.arange(num_rows) % 5
    tokens_BL = rng.integers(1, VOCAB_SIZE, (num_rows, 5))
    tokens_BL = np.where(np.arange(5)[None] < lengths_B[:, None], tokens_BL, 0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (num_rows, 8, 8, 3)), jnp.uint8),
        "tokens": jnp.asarray(tokens_BL, jnp.int32),
        "position": jnp.arange(100, 100 + num_rows, dtype=jnp.uint32),
    }


@functools.cache
def trained_params():
    """Parameters whose zero-initialised head is not zero."""
    params = MODEL.init(jax.random.key(0))
    head = params["decoder"]["head"]
    head["kernel"] = jax.random.normal(jax.random.key(1), head["kernel"].shape)
    return params


@functools.cache
def loss_and_grads(parallel_fraction, label_smoothing):
    """(params, batch, key) -> ((loss, metrics), grads), compiled once a setting."""
    options = {"parallel_fraction": parallel_fraction, "label_smoothing": label_smoothing}
    loss = functools.partial(captioning_loss, MODEL, **options)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_decoder_inputs_shift_or_mask():
    labels_BL = jnp.array([[5, 6, 1, 0], [7, 1, 0, 0]])
    shifted = [[0, 5, 6, 1], [0, 7, 1, 0]]
    np.testing.assert_array_equal(decoder_inputs(labels_BL, None, 9), shifted)
    inputs_BL = decoder_inputs(labels_BL, jnp.array([False, True]), 9)
    np.testing.assert_array_equal(inputs_BL, [shifted[0], [9] * 4])


def test_modes_come_at_the_given_rate_and_from_the_position_alone():
    key, position_B = jax.random.key(3), jnp.arange(4000, dtype=jnp.uint32)
    for fraction in (0.25, 0.75):
        is_parallel_B = draw_parallel(key, position_B, fraction)
        deviation = np.sqrt(fraction * (1 - fraction) / len(position_B))
        assert abs(is_parallel_B.mean() - fraction) < 4 * deviation
    np.testing.assert_array_equal(draw_parallel(key, position_B[::-7], 0.75), is_parallel_B[::-7])
    assert draw_parallel(key, position_B, 1.0).all()
    assert not draw_parallel(key, position_B, 0.0).any()
    other_B = draw_parallel(jax.random.key(4), position_B, 0.75)
    assert (other_B != is_parallel_B).mean() > 0.3


def test_modes_are_the_same_on_a_mesh():
    key, position_B = jax.random.key(3), jnp.arange(16, dtype=jnp.uint32)
    expected = draw_parallel(key, position_B, 0.5)
    draw = jax.jit(functools.partial(draw_parallel, fraction=0.5))
    with jax.set_mesh(make_mesh(MeshShape(data=2, fsdp=4))):
        is_parallel_B = draw(key, jax.device_put(position_B, act_B))
        assert jax.typeof(is_parallel_B).sharding.spec == act_B
    np.testing.assert_array_equal(is_parallel_B, expected)


def test_mean_caption_loss_weighs_captions_alike():
    nll_BL = jnp.array([[1.0, 3.0, 9.0], [6.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    labels_BL = jnp.array([[4, 1, 0], [1, 0, 0], [0, 0, 0]])
    loss, metrics = mean_caption_loss(nll_BL, labels_BL)
    np.testing.assert_allclose(loss, (2 + 6 + 0) / 3)
    metrics = reduce_metrics(metrics)
    np.testing.assert_allclose(metrics["token_loss"], (1 + 3 + 6) / 3)
    np.testing.assert_allclose(metrics["tokens_per_caption"], 1)
    gradient = jax.grad(lambda nll_BL: mean_caption_loss(nll_BL, labels_BL)[0])(nll_BL)
    np.testing.assert_allclose(gradient, np.array([[0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]]) / 3)


def test_the_first_loss_is_the_log_of_the_vocabulary():
    params = MODEL.init(jax.random.key(0))
    (loss, _), _ = loss_and_grads(0.5, 0.1)(params, batch(), jax.random.key(2))
    np.testing.assert_allclose(loss, np.log(VOCAB_SIZE), rtol=1e-6)


@pytest.mark.parametrize(("fraction", "label_smoothing"), [(0.0, 0.0), (0.5, 0.1), (1.0, 0.0)])
def test_loss_and_metrics_match_log_softmax(fraction, label_smoothing):
    params, rows, key = trained_params(), batch(), jax.random.key(2)
    (loss, metrics), grads = loss_and_grads(fraction, label_smoothing)(params, rows, key)
    metrics, labels_BL = reduce_metrics(metrics), rows["tokens"]
    is_parallel_B = draw_parallel(key, rows["position"], fraction)
    off = label_smoothing / (VOCAB_SIZE - 1)

    def by_hand(params):
        inputs_BL = decoder_inputs(labels_BL, is_parallel_B, MODEL.mask_id)
        patches_BPD = MODEL.encode(params, rows["image"])
        hidden_BLE = MODEL.hidden(params, inputs_BL, patches_BPD, is_parallel_B)
        logits_BLV = MODEL.logits(params, hidden_BLE)[..., :VOCAB_SIZE]
        targets_BLV = jax.nn.one_hot(labels_BL, VOCAB_SIZE) * (1 - label_smoothing - off) + off
        nll_BL = -jnp.sum(targets_BLV * jax.nn.log_softmax(logits_BLV), -1)
        is_token_BL = labels_BL != 0
        means_B = (nll_BL * is_token_BL).sum(1) / is_token_BL.sum(1)
        return means_B.mean(), (means_B, (nll_BL * is_token_BL).sum() / is_token_BL.sum())

    by_hand = jax.jit(jax.value_and_grad(by_hand, has_aux=True))
    (expected, (means_B, token_loss)), expected_grads = by_hand(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["token_loss"], token_loss, rtol=1e-5)
    modes = {"causal_loss": ~is_parallel_B, "parallel_loss": is_parallel_B}
    modes = {name: mask for name, mask in modes.items() if mask.any()}
    assert set(modes) == {"causal_loss", "parallel_loss"} & set(metrics)
    for name, mask in modes.items():
        np.testing.assert_allclose(metrics[name], means_B[mask].mean(), rtol=1e-5)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_a_batch_without_parallel_examples_has_finite_metrics():
    rows, key = batch(), jax.random.key(2)
    positions = jnp.arange(100, dtype=jnp.uint32)
    rows["position"] = positions[~draw_parallel(key, positions, 0.5)][:8]
    (loss, metrics), _ = loss_and_grads(0.5, 0.1)(trained_params(), rows, key)
    metrics = reduce_metrics(metrics)
    assert metrics["parallel_loss"] == 0
    np.testing.assert_allclose(metrics["causal_loss"], loss, rtol=1e-6)


def test_captions_without_tokens_are_safe():
    rows = batch()
    rows["tokens"] = jnp.zeros_like(rows["tokens"])
    (loss, metrics), grads = loss_and_grads(0.5, 0.1)(trained_params(), rows, jax.random.key(2))
    assert loss == 0
    assert not any(x.any() for x in jax.tree.leaves(grads))
    assert all(value == 0 for value in reduce_metrics(metrics).values())


def test_parallel_mode_needs_a_mask_token():
    model = Captioner(dataclasses.replace(MODEL.config, mask_token=False))
    with pytest.raises(UserError, match="needs a mask token"):
        captioning_loss(model, {}, batch(), jax.random.key(0), parallel_fraction=0.5)
