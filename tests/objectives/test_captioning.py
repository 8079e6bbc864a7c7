"""Decoder inputs, and the captioning loss of a tiny captioner in every mode."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch, place_tree
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.objectives import caption_rows
from capjax.objectives.caption_rows import decoder_inputs, draw_caption_rows, draw_dropped
from capjax.objectives.captioning import (
    CaptioningObjective,
    captioning_loss,
    captioning_prepare,
    captioning_rows,
)
from capjax.objectives.metrics import masked_mean, reduce_metrics
from capjax.objectives.objective import Loss
from capjax.objectives.parallel_draw import draw_rows
from capjax.training.state import TrainState
from capjax.training.step import make_train_step

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
def loss_and_grads(**settings):
    """(params, batch, key) -> ((loss, metrics), grads), compiled once a setting."""
    loss = functools.partial(captioning_loss, MODEL, **settings)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def assert_trees_close(actual, expected, rtol=1e-4):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def test_decoder_inputs_shift_or_mask():
    labels_BL = jnp.array([[5, 6, 1, 0], [7, 1, 0, 0]])
    shifted = [[0, 5, 6, 1], [0, 7, 1, 0]]
    np.testing.assert_array_equal(decoder_inputs(labels_BL, None, 9), shifted)
    inputs_BL = decoder_inputs(labels_BL, jnp.array([False, True]), 9)
    np.testing.assert_array_equal(inputs_BL, [shifted[0], [9] * 4])


KEY = jax.random.key(2)


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def by_hand(params, images, drawn, is_dropped_R, label_smoothing, z_loss, by_token):
    """(loss, {name: mean}) of drawn rows, from whole logits in one mixed batch."""
    memory_BPD = MODEL.encode(params, images)
    memory_BPD = jnp.where(is_dropped_R[:, None, None], 0, memory_BPD)
    inputs_RL = decoder_inputs(*drawn[:2], MODEL.mask_id, drawn.is_masked_RL)
    hidden_RLE = MODEL.hidden(params, inputs_RL, memory_BPD, drawn.is_parallel_R)
    logits_RLV = MODEL.logits(params, hidden_RLE)[..., :VOCAB_SIZE]
    off = label_smoothing / (VOCAB_SIZE - 1)
    targets_RLV = jax.nn.one_hot(drawn.labels_RL, VOCAB_SIZE) * (1 - label_smoothing - off) + off
    scored_RL = drawn.is_scored_RL
    nll_RL = -jnp.sum(targets_RLV * jax.nn.log_softmax(logits_RLV), -1) * scored_RL
    penalty_RL = z_loss * jax.nn.logsumexp(logits_RLV, -1) ** 2 * scored_RL
    counts_R = jnp.maximum(scored_RL.sum(1), 1)

    def mean(x_RL):
        by_caption = (x_RL.sum(1) / counts_R).mean()
        return jnp.where(by_token, x_RL.sum() / scored_RL.sum(), by_caption)

    is_parallel_R = drawn.is_parallel_R
    masks = {
        "causal_loss": ~is_parallel_R,
        "parallel_loss": is_parallel_R,
        "conditional_causal_loss": ~is_parallel_R & ~is_dropped_R,
        "unconditional_causal_loss": ~is_parallel_R & is_dropped_R,
    }
    means_R = nll_RL.sum(1) / counts_R
    means = {name: masked_mean(means_R, mask) for name, mask in masks.items()}
    means |= {"token_loss": masked_mean(nll_RL, scored_RL), "z_loss": mean(penalty_RL)}
    means["tokens_per_caption"] = (drawn.labels_RL != 0).sum(1).mean()
    return mean(nll_RL + penalty_RL), reduce_metrics(means)


CAP = {"parallel_fraction": 0.0}
ALL_PARALLEL = {"parallel_fraction": 1.0}
BERNOULLI = {"parallel_fraction": 0.5, "label_smoothing": 0.1, "image_dropout": 0.4}
FIXED = {"parallel_draw": "fixed", "parallel_fraction": 0.75}
FIXED_ALL = FIXED | {"image_dropout": 0.4, "normalization": "token", "z_loss": 0.01}
FIXED_MASKED = {
    "parallel_draw": "fixed",
    "parallel_fraction": 0.625,
    "masking_ratio": 0.6,
    "score_visible": False,
    "normalization": "token",
}
ICMLM = {"parallel_fraction": 1.0, "masking_ratio": 0.4, "score_visible": False}
PARITY_MASKED = {"parallel_fraction": 0.5, "masking_ratio": 0.6}


def test_the_first_loss_is_the_log_of_the_vocabulary():
    params = MODEL.init(jax.random.key(0))
    (loss, _), _ = loss_and_grads(**BERNOULLI)(params, batch(), KEY)
    np.testing.assert_allclose(loss, np.log(VOCAB_SIZE), rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [CAP, ALL_PARALLEL, BERNOULLI, FIXED_ALL, FIXED_MASKED, ICMLM, PARITY_MASKED],
    ids=["cap", "all", "bernoulli", "fixed_all", "fixed_masked", "icmlm", "parity_masked"],
)
def test_loss_and_metrics_match_log_softmax_in_a_mixed_batch(settings):
    """So the fixed draw equals the mixed batch that is given its modes, gradients included."""
    params, rows, objective = trained_params(), batch(), CaptioningObjective(**settings)
    drawn, _ = draw_caption_rows(rows, KEY, objective)
    if objective.parallel_draw == "fixed":
        assert drawn.is_parallel_R.sum() == 8 * objective.parallel_fraction
    if drawn.is_masked_RL is None:
        drawn = drawn._replace(is_masked_RL=jnp.ones((8, 5), bool))
    (expected, means), expected_grads = by_hand(
        params,
        rows["image"],
        drawn,
        draw_dropped(rows, KEY, objective.image_dropout),
        objective.label_smoothing,
        objective.z_loss,
        objective.normalization == "token",
    )
    (loss, metrics), grads = loss_and_grads(**settings)(params, rows, KEY)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_trees_close(grads, expected_grads)
    names = {"token_loss", "tokens_per_caption"}
    names |= {"causal_loss"} if objective.parallel_fraction < 1 else set()
    names |= {"parallel_loss"} if objective.parallel_fraction else set()
    if objective.image_dropout:
        names |= {"conditional_causal_loss", "unconditional_causal_loss"}
    names |= {"z_loss"} if objective.z_loss else set()
    assert set(metrics) == names
    for name, metric in reduce_metrics(metrics).items():
        np.testing.assert_allclose(metric, means[name], rtol=1e-4, err_msg=name)


def test_a_batch_without_parallel_examples_has_finite_metrics():
    rows = batch()
    positions = jnp.arange(100, dtype=jnp.uint32)
    rows["position"] = positions[~draw_rows(KEY, positions, 0.5)][:8]
    (loss, metrics), _ = loss_and_grads(**BERNOULLI)(trained_params(), rows, KEY)
    metrics = reduce_metrics(metrics)
    assert metrics["parallel_loss"] == 0
    np.testing.assert_allclose(metrics["causal_loss"], loss, rtol=1e-6)


@pytest.mark.parametrize(
    "settings", [BERNOULLI, FIXED_ALL, ICMLM], ids=["bernoulli", "fixed", "icmlm"]
)
def test_captions_without_tokens_are_safe(settings):
    rows = batch()
    rows["tokens"] = jnp.zeros_like(rows["tokens"])
    (loss, metrics), grads = loss_and_grads(**settings)(trained_params(), rows, KEY)
    assert loss == 0
    assert not any(x.any() for x in jax.tree.leaves(grads))
    assert all(value == 0 for value in reduce_metrics(metrics).values())


def test_parallel_mode_needs_a_mask_token():
    model = Captioner(dataclasses.replace(MODEL.config, mask_token=False))
    with pytest.raises(UserError, match="needs a mask token"):
        captioning_rows(model, {}, jnp.zeros((8, 4, 16)), batch(), KEY, parallel_fraction=0.5)


# The fixed draw.


def test_the_fixed_draw_has_the_expectation_of_independent_draws(monkeypatch):
    """Over all choices: p * (all rows parallel) + (1 - p) * (all rows causal)."""
    params, rows = trained_params(), batch()

    def fixed(params, orders_GJ):
        monkeypatch.setattr(caption_rows, "draw_orders", lambda *_: orders_GJ)
        return captioning_loss(MODEL, params, rows, KEY, **FIXED)[0]

    firsts = np.array(list(itertools.product(range(4), repeat=2)))  # each group's causal row
    orders_SGJ = jnp.asarray((firsts[..., None] + np.arange(4)) % 4)
    losses_S, grads_S = jax.jit(jax.vmap(jax.value_and_grad(fixed), (None, 0)))(params, orders_SGJ)
    assert np.unique(losses_S).size == 16  # the choice matters
    (parallel, _), parallel_grads = loss_and_grads(**ALL_PARALLEL)(params, rows, KEY)
    (causal, _), causal_grads = loss_and_grads(**CAP)(params, rows, KEY)
    np.testing.assert_allclose(losses_S.mean(), 0.75 * parallel + 0.25 * causal, rtol=1e-6)
    expected = jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, parallel_grads, causal_grads)
    assert_trees_close(jax.tree.map(lambda x: x.mean(0), grads_S), expected)


# Masks.


def test_only_masked_labels_count_and_the_others_are_read():
    params, rows = trained_params(), batch()
    drawn, _ = draw_caption_rows(rows, KEY, CaptioningObjective(**ICMLM))
    inputs_RL = decoder_inputs(*drawn[:2], MODEL.mask_id, drawn.is_masked_RL)
    np.testing.assert_array_equal(inputs_RL[drawn.is_masked_RL], MODEL.mask_id)
    np.testing.assert_array_equal(
        inputs_RL[~drawn.is_masked_RL], drawn.labels_RL[~drawn.is_masked_RL]
    )
    (_, metrics), _ = loss_and_grads(**ICMLM)(params, rows, KEY)
    # Lengths 1 to 5 and 1 to 3: int(0.4 * n), but at least one.
    assert metrics["token_loss"].count == 1 + 1 + 1 + 1 + 2 + 1 + 1 + 1
    assert metrics["tokens_per_caption"].total == 15 + 6
    drawn, _ = draw_caption_rows(rows, KEY, CaptioningObjective(**PARITY_MASKED))
    assert (drawn.is_masked_RL.sum(1) == int(0.6 * 5)).all()
    np.testing.assert_array_equal(drawn.is_scored_RL, drawn.labels_RL != 0)


# Image dropout.


def test_images_drop_independently_of_modes_and_by_position():
    position_B = jnp.arange(4000, dtype=jnp.uint32)
    rows = {"position": position_B, "tokens": jnp.ones((4000, 1), jnp.int32)}
    is_dropped_B = draw_dropped(rows, KEY, 0.5)
    objective = CaptioningObjective(parallel_fraction=0.5)
    is_parallel_B = draw_caption_rows(rows, KEY, objective)[0].is_parallel_R
    for both in (is_dropped_B, is_dropped_B & is_parallel_B, is_dropped_B & ~is_parallel_B):
        rate = 0.5 if both is is_dropped_B else 0.25
        assert abs(both.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / 4000)
    some = {"position": position_B[100:120:3]}
    np.testing.assert_array_equal(draw_dropped(some, KEY, 0.5), is_dropped_B[100:120:3])


def test_a_caption_without_its_image_does_not_depend_on_it():
    params, rows = trained_params(), batch()
    is_dropped_B = draw_dropped(rows, KEY, BERNOULLI["image_dropout"])
    assert 0 < is_dropped_B.sum() < 8

    def loss_with_black(is_black_B):
        image = jnp.where(is_black_B[:, None, None, None], 0, rows["image"])
        return loss_and_grads(**BERNOULLI)(params, rows | {"image": image}, KEY)[0][0]

    loss = loss_with_black(jnp.zeros(8, bool))
    assert loss_with_black(is_dropped_B) == loss
    assert loss_with_black(~is_dropped_B) != loss


# Several captions an image, means over tokens, meshes, microbatches.


def several(num_rows=8):
    """A batch with three captions an image, and the same with each caption as an example."""
    rows = batch(num_rows)
    flat = batch(3 * num_rows)
    rows["tokens"] = flat["tokens"].reshape(num_rows, 3, 5)
    flat["image"] = jnp.repeat(rows["image"], 3, axis=0)
    flat["position"] = 300 + jnp.arange(3 * num_rows, dtype=jnp.uint32)  # 3 * 100 and on
    return rows, flat


SEVERAL = FIXED | {"masking_ratio": 0.5, "score_visible": False, "normalization": "token"}


def test_captions_of_an_image_count_as_examples_of_their_own():
    rows, flat = several()
    loss_fn = loss_and_grads(**SEVERAL)
    (loss, metrics), grads = loss_fn(trained_params(), rows, KEY)
    (expected, expected_metrics), expected_grads = loss_fn(trained_params(), flat, KEY)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_trees_close(grads, expected_grads)
    assert_trees_close(reduce_metrics(metrics), reduce_metrics(expected_metrics), 1e-5)


def test_weights_of_tokens_average_to_one_over_the_batch():
    rows, _ = several()
    prepared = captioning_prepare(rows, KEY, normalization="token")
    lengths_BK = (rows["tokens"] != 0).sum(2)
    weights_BK = prepared.pop("captioning_weights")
    np.testing.assert_allclose(weights_BK, lengths_BK / lengths_BK.mean(), rtol=1e-6)
    assert prepared.keys() == rows.keys()
    assert captioning_prepare(rows, KEY, normalization="caption") is rows


@functools.cache
def on_one_device():
    (loss, metrics), grads = loss_and_grads(**FIXED_ALL)(trained_params(), batch(32), KEY)
    return jax.device_get((loss, reduce_metrics(metrics), grads))


@pytest.mark.parametrize(
    "shape", [MeshShape(data=8), MeshShape(data=1, fsdp=8), MeshShape(data=2, fsdp=2, tensor=2)]
)
def test_meshes_agree_with_one_device(shape):
    expected = on_one_device()
    params, rows = jax.device_get((trained_params(), batch(32)))
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        params = place_tree(mesh, params, MODEL.param_specs())
        loss = functools.partial(captioning_loss, MODEL, **FIXED_ALL)
        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (loss, metrics), grads = step(params, place_batch(mesh, rows), KEY)
        actual = jax.device_get((loss, reduce_metrics(metrics), grads))
    assert_trees_close(actual, expected, 2e-4)


def test_microbatches_add_up_to_the_batch():
    rows, _ = several()

    def microbatch(params, batch, key):
        memory_BPD = MODEL.encode(params, batch["image"])
        loss = captioning_rows(MODEL, params, memory_BPD, batch, key, **SEVERAL)
        return (*loss, ())

    loss = Loss(
        rows=microbatch,
        prepare=functools.partial(captioning_prepare, **SEVERAL),
        rows_together=CaptioningObjective(**SEVERAL).rows_together(3),
    )
    tx, params = optax.sgd(1.0), trained_params()
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.key(5))
    (whole, whole_metrics), grads = loss_and_grads(**SEVERAL)(
        params, rows, jax.random.fold_in(state.key, 0)
    )
    expected = jax.tree.map(jnp.subtract, params, grads)
    state = jax.tree.map(jnp.copy, state)
    state, metrics = make_train_step(loss, tx, accumulation_steps=2)(state, rows)
    assert_trees_close(state.params, expected)
    np.testing.assert_allclose(metrics["loss"], whole, rtol=1e-5)
    for name, metric in reduce_metrics(whole_metrics).items():
        np.testing.assert_allclose(metrics[name], metric, rtol=1e-5, err_msg=name)
