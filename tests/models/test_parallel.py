"""Parallel mode with its common part computed once equals parallel mode row by row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch, place_tree
from capjax.models import Captioner
from tests.models.conftest import random_params


def compute(config, params, batch, *, once: bool):
    """(states, gradients of parameters and memory) of a loss with a gradient everywhere."""
    model = Captioner(config)

    def loss(params, memory):
        if once:
            hidden = model.parallel_hidden(params, memory, 5)
        else:
            tokens = jnp.full_like(batch["tokens"][:, :5], model.mask_id)
            is_parallel = jnp.ones_like(tokens[:, 0], bool)
            hidden = model.hidden(params, tokens, memory, is_parallel)
        weights = jnp.sin(jnp.arange(5 * hidden.shape[2])).reshape(5, -1)
        return jnp.sum(jnp.square(hidden) * weights[None]), hidden

    def both(params, images):
        memory = model.encode(params, images)
        grads, hidden = jax.grad(loss, (0, 1), has_aux=True)(params, memory)
        return hidden, grads

    return jax.device_get(jax.jit(both)(params, batch["image"]))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scan": False, "remat": "full"},
        {"remat": "dots", "decoder_depth": 1},
        {"decoder_posemb": "rotary", "decoder_qk_norm": True, "mask_padding": True},
    ],
    ids=str,
)
def test_states_and_gradients(fields, config, batch, assert_trees_close):
    config = dataclasses.replace(config, **fields)
    params = random_params(config)
    found = compute(config, params, batch, once=True)
    assert_trees_close(found, compute(config, params, batch, once=False), 2e-5)


@pytest.mark.parametrize(
    ("shape", "fields"),
    [
        (MeshShape(data=8), {}),
        (MeshShape(data=1, fsdp=8), {"scan": False}),
        (MeshShape(data=2, fsdp=2, tensor=2), {"remat": "full"}),
    ],
    ids=str,
)
def test_on_a_mesh(shape, fields, config, params, batch, assert_trees_close):
    config = dataclasses.replace(config, **fields)
    want = compute(config, params, batch, once=False)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        placed = place_tree(mesh, params, Captioner(config).param_specs())
        found = compute(config, placed, place_batch(mesh, jax.device_get(batch)), once=True)
    assert_trees_close(found, want, 1e-5)


def test_flops_of_the_first_layer_are_saved(config):
    """Forward, one layer: all rows but one are spared five projections and self-attention."""
    config = dataclasses.replace(config, decoder_depth=1, scan=False, vocab_size=100)
    model = Captioner(config)
    rows, length, width = 16, config.text_length, config.decoder_width

    def by_row(params, memory):
        tokens = jnp.full((rows, length), model.mask_id)
        return model.hidden(params, tokens, memory, jnp.ones(rows, bool))

    def once(params, memory):
        return model.parallel_hidden(params, memory, length)

    memory = jax.ShapeDtypeStruct((rows, config.memory_length, config.width), jnp.float32)

    def flops(function):
        compiled = jax.jit(function).lower(model.abstract_params(), memory).compile()
        return (compiled.cost_analysis() or {})["flops"]

    matmuls = (rows - 1) * length * 2 * width * (5 * width + 2 * length)
    saved = flops(by_row) - flops(once)
    assert matmuls <= saved <= 1.5 * matmuls  # element-wise work is spared too


def test_models_without_a_mask_token_are_refused(config, params):
    model = Captioner(dataclasses.replace(config, mask_token=False))
    with pytest.raises(UserError, match="mask_token=False"):
        model.parallel_hidden(params, jnp.zeros((1, 4, 32)), 5)
    with pytest.raises(UserError, match="7 tokens, but text_length=6"):
        Captioner(config).parallel_hidden(params, jnp.zeros((1, 4, 32)), 7)


def test_one_row_is_no_special_case(config, params):
    memory = jax.random.normal(jax.random.key(0), (2, 4, 32))
    model = Captioner(config)
    both = model.parallel_hidden(params, memory, 6)
    np.testing.assert_allclose(model.parallel_hidden(params, memory[:1], 6), both[:1], atol=1e-5)
