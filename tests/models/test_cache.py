"""Decoding with the cache equals the whole sequence at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.mesh import MeshShape, act_BLV, make_mesh, place_batch, place_tree, reshard
from capjax.models import Captioner


def decode(model, params, images, tokens_BL):
    """Logits (B, L, V) one position at a time, in a `while_loop` as a sampler would."""
    batch, length = tokens_BL.shape
    cache = model.start_cache(params, model.encode(params, images), length)
    empty = reshard(jnp.zeros((batch, length, 128)), act_BLV)

    def body(state):
        i, cache, logits_BLV = state
        token_B = jax.lax.dynamic_index_in_dim(tokens_BL, i, 1, keepdims=False)
        logits_BV, cache = model.decode_step(params, token_B, i, cache)
        return i + 1, cache, jax.lax.dynamic_update_slice(logits_BLV, logits_BV[:, None], (0, i, 0))

    return jax.lax.while_loop(lambda state: state[0] < length, body, (0, cache, empty))[2]


def teacher_forced(model, params, images, tokens_BL):
    hidden = model.hidden(params, tokens_BL, model.encode(params, images))
    return model.logits(params, hidden)


def run(function, model, *args):
    return jax.jit(functools.partial(function, model))(*args)


@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [
        ({}, 1e-5),
        ({"scan": False, "posemb": "sincos2d"}, 1e-5),
        ({"dtype": "bfloat16"}, 0.05),
    ],
    ids=str,
)
def test_cached_equals_teacher_forcing(fields, tolerance, config, params, batch):
    model = Captioner(dataclasses.replace(config, **fields))
    if "posemb" in fields:
        params = {
            part: {name: x for name, x in tree.items() if name != "position_embedding"}
            for part, tree in params.items()
        }
    args = (model, params, batch["image"], batch["tokens"])
    np.testing.assert_allclose(
        run(decode, *args), run(teacher_forced, *args), rtol=tolerance, atol=tolerance
    )


def test_cached_equals_teacher_forcing_on_a_mesh(config, params, batch):
    model = Captioner(config)
    want = run(teacher_forced, model, params, batch["image"], batch["tokens"])
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = place_batch(mesh, jax.device_get(batch))
        params = place_tree(mesh, params, model.param_specs())
        found = run(decode, model, params, placed["image"], placed["tokens"])
    assert found.sharding.spec == act_BLV
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_cache_may_be_shorter_or_longer_than_the_text(config, params, batch):
    model = Captioner(config)
    patches = model.encode(params, batch["image"])
    want, _ = model.decode_step(
        params, batch["tokens"][:, 0], 0, model.start_cache(params, patches, 1)
    )
    cache = model.start_cache(params, patches, 6)
    found, after = model.decode_step(params, batch["tokens"][:, 0], 0, cache)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    # Only position 0 was written, and the patches' keys and values are as they were.
    assert np.all(np.asarray(after.self_key_XBLNK)[:, :, 1:] == 0)
    assert np.all(np.any(np.asarray(after.self_key_XBLNK)[:, :, 0] != 0, -1))
    np.testing.assert_array_equal(after.cross_key_XBPNK, cache.cross_key_XBPNK)
