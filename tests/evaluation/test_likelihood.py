"""Held-out losses against log_softmax by hand, however the rows fall into batches."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.evaluation.likelihood import _batch_sums, _prepare, evaluate_likelihood
from capjax.mesh import MeshShape, make_mesh, place_tree
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.objectives.captioning import decoder_inputs

NUM_ROWS, LENGTH, VOCAB_SIZE = 11, 5, 40
END_ALONE = np.array([[1, 0, 0, 0, 0]], np.int32)
MODEL = Captioner(
    CaptionerConfig(
        image_size=8,
        patch_size=4,
        width=16,
        depth=1,
        num_heads=2,
        mlp_dim=32,
        vocab_size=VOCAB_SIZE,
        text_length=LENGTH,
    )
)
ONE = make_mesh(MeshShape(), devices=jax.devices()[:1])


@functools.cache
def params():
    """Parameters that look at the image, and whose zero-initialised head is not zero."""
    params = MODEL.init(jax.random.key(0))
    head = params["decoder"]["head"]
    head["kernel"] = jax.random.normal(jax.random.key(1), head["kernel"].shape)
    return params


@functools.cache
def rows():
    rng = np.random.default_rng(0)
    lengths_B = 2 + np.arange(NUM_ROWS) % (LENGTH - 1)
    tokens_BL = rng.integers(1, VOCAB_SIZE, (NUM_ROWS, LENGTH), np.int32)
    return {
        "image": rng.integers(0, 256, (NUM_ROWS, 8, 8, 3), np.uint8),
        "tokens": np.where(np.arange(LENGTH)[None] < lengths_B[:, None], tokens_BL, 0),
        "index": np.arange(NUM_ROWS, dtype=np.int32),
    }


def batches(batch_size):
    """The rows in batches; the last is filled up with masked rows, which repeat the first one."""
    for start in range(0, NUM_ROWS, batch_size):
        index = start + np.arange(batch_size)
        batch = {name: x[np.where(index < NUM_ROWS, index, 0)] for name, x in rows().items()}
        yield batch | {"mask": index < NUM_ROWS}


def evaluate(batch_size, mesh=ONE, params_=None):
    placed = place_tree(mesh, params_ or params(), MODEL.param_specs())
    return evaluate_likelihood(MODEL, placed, batches(batch_size), mesh)


@functools.cache
def by_hand():
    labels_BL = jnp.asarray(rows()["tokens"])
    patches_BPD = MODEL.encode(params(), jnp.asarray(rows()["image"]))
    is_token_BL = np.asarray(labels_BL) != 0
    expected = {}
    for prefix, is_parallel in (("", False), ("parallel_", True)):
        is_parallel_B = jnp.full(NUM_ROWS, is_parallel)
        inputs_BL = decoder_inputs(labels_BL, is_parallel_B, MODEL.mask_id)
        hidden_BLE = MODEL.hidden(params(), inputs_BL, patches_BPD, is_parallel_B)
        logprobs_BLV = jax.nn.log_softmax(MODEL.logits(params(), hidden_BLE))
        nll_BL = -jnp.take_along_axis(logprobs_BLV, labels_BL[..., None], -1)[..., 0]
        nll_BL = np.asarray(nll_BL, np.float64) * is_token_BL
        expected |= {
            f"{prefix}loss": nll_BL.sum() / is_token_BL.sum(),
            f"{prefix}perplexity": np.exp(nll_BL.sum() / is_token_BL.sum()),
            f"{prefix}caption_loss": (nll_BL.sum(1) / is_token_BL.sum(1)).mean(),
            f"{prefix}caption_nats": nll_BL.sum(1).mean(),
        }
    return expected


@pytest.mark.parametrize("batch_size", [4, 8])
def test_losses_by_hand_whatever_the_batch(batch_size):
    metrics = evaluate(batch_size)
    shuffled = metrics.pop("shuffled_images_loss")
    assert abs(shuffled - metrics["loss"]) > 1e-3
    assert metrics.keys() == by_hand().keys()
    for name, value in by_hand().items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_a_mesh_gives_the_same():
    metrics, expected = evaluate(8, make_mesh(MeshShape(data=2, fsdp=2, tensor=2))), evaluate(8)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_a_model_that_ignores_the_image_is_found_out():
    blind = jax.tree.map(lambda x: x, params())
    attention = blind["decoder"]["blocks"]["cross_attention"]
    attention["out"] = jax.tree.map(jnp.zeros_like, attention["out"])
    # Whole batches of real rows: else the token counts of the two losses would differ.
    metrics = evaluate_likelihood(
        MODEL, blind, [next(batches(8)) | {"mask": np.ones(8, bool)}], ONE
    )
    np.testing.assert_allclose(metrics["shuffled_images_loss"], metrics["loss"], rtol=1e-6)


def test_shuffled_captions_are_of_other_real_rows():
    tokens_BL = np.arange(1, 13, dtype=np.int32).reshape(6, 2)
    mask = np.array([True, True, False, True, True, False])
    batch = _prepare({"image": np.zeros(6), "tokens": tokens_BL, "mask": mask})
    assert sorted(batch["others"][mask, 0]) == sorted(tokens_BL[mask, 0])
    assert (batch["others"][mask, 0] != tokens_BL[mask, 0]).all()
    assert not batch["others"][~mask].any() and not batch["tokens"][~mask].any()
    alone = _prepare({"image": np.zeros(6), "tokens": tokens_BL, "mask": np.arange(6) == 1})
    assert not alone["others"].any() and alone["tokens"].any()


def test_an_image_without_caption_counts_nowhere():
    """It is the same as no row at all, also for which captions are given whose images."""
    batch = next(batches(8))
    without = np.arange(8) % 3 == 1
    some = batch | {"tokens": np.where(without[:, None], END_ALONE, batch["tokens"])}
    captioned = evaluate_likelihood(MODEL, params(), [batch | {"mask": ~without}], ONE)
    found = evaluate_likelihood(MODEL, params(), [some], ONE)
    assert found == captioned
    assert not _prepare(some)["others"][without].any()


def test_many_batches_and_calls_compile_once(caplog):
    mesh = make_mesh(MeshShape(), devices=jax.devices()[1:2])
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        evaluate(8, mesh), evaluate(8, mesh)
    names = [record.getMessage() for record in caplog.records]
    assert sum("Finished XLA compilation of jit(_batch_sums)" in name for name in names) == 1


def test_no_rows_is_an_error():
    masked = [batch | {"mask": np.zeros(8, bool)} for batch in batches(8)]
    uncaptioned = [batch | {"tokens": np.tile(END_ALONE, (8, 1))} for batch in batches(8)]
    for nothing in ([], masked, uncaptioned):
        with pytest.raises(UserError, match="expected captioned examples, found none"):
            evaluate_likelihood(MODEL, params(), nothing, ONE)


def test_a_model_without_mask_token_has_no_parallel_metrics():
    model = Captioner(dataclasses.replace(MODEL.config, mask_token=False))
    batch = _prepare(next(batches(8)))
    sums = jax.eval_shape(functools.partial(_batch_sums, model), model.abstract_params(), batch)
    assert sums.keys() == {"loss", "caption_loss", "caption_nats", "shuffled_images_loss"}
