"""Decoding with the cache equals the whole sequence at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.mesh import BATCH, MeshShape, act_BLV, make_mesh, place_batch, place_tree, reshard
from capjax.models import Captioner
from tests.models.conftest import random_params

HISTORY = jax.sharding.PartitionSpec(None, BATCH, None, None)


def decode(model, params, images, tokens_BL):
    """Logits (B, L, V) one position at a time, in a `while_loop` as a sampler would."""
    batch, length = tokens_BL.shape
    memory = model.encode(params, images)
    step, cache = model.start_decoding(params, [memory], batch=batch, length=length)
    empty = reshard(jnp.zeros((batch, length, 128)), act_BLV)

    def body(state):
        i, cache, logits_BLV = state
        token_B = jax.lax.dynamic_index_in_dim(tokens_BL, i, 1, keepdims=False)
        logits_B1V, _, cache = step(token_B[:, None], i, cache)
        return i + 1, cache, jax.lax.dynamic_update_slice(logits_BLV, logits_B1V, (0, i, 0))

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
    memory = model.encode(params, batch["image"])
    found = {}
    for length in (1, 6):
        step, cache = model.start_decoding(params, [memory], batch=8, length=length)
        found[length], _, after = step(batch["tokens"][:, :1], 0, cache)
    np.testing.assert_allclose(found[6], found[1], rtol=1e-5, atol=1e-6)
    for layer in after:  # only position 0 was written
        assert np.all(np.asarray(layer.key_BNRLK)[:, :, :, 1:] == 0)
        assert np.all(np.any(np.asarray(layer.key_BNRLK)[:, :, :, 0] != 0, -1))


LENGTH, ROWS = 6, 3
GROUPS = ("image", None, "other")  # what the groups of rows see


def descend(tokens_BSL, parents_BSL):
    """(texts [B, S, L] as they are after the last position, the rows in which they lie).

    Before position l is written, row s takes over the past of row parents[b, s, l].
    """
    texts, lie = np.zeros_like(tokens_BSL), np.zeros_like(tokens_BSL)
    history = []
    for i in range(tokens_BSL.shape[2]):
        take = parents_BSL[:, :, i, None]
        texts = np.take_along_axis(texts, take, 1)
        lie = np.take_along_axis(lie, take, 1)
        texts[:, :, i] = tokens_BSL[:, :, i]
        lie[:, :, i] = np.arange(tokens_BSL.shape[1])
        history.append(lie.copy())
    return texts, np.stack(history)


@functools.partial(jax.jit, static_argnums=0)
def decode_rows(model, params, images, others, tokens_BSL, history_LBSL):
    """Logits (L, B, R, V) of texts that go on from one another's, in the three `GROUPS`."""
    memory, other = model.encode(params, images), model.encode(params, others)
    step, cache = model.start_decoding(
        params, [memory, None, other], batch=len(images), length=LENGTH, num_rows=ROWS
    )

    def body(cache, x):
        index, tokens_BS, ancestors_BSL = x
        logits_BRV, _, cache = step(tokens_BS, index, cache, ancestors_BSL)
        return cache, logits_BRV

    inputs = (jnp.arange(LENGTH), tokens_BSL.transpose(2, 0, 1), history_LBSL)
    return jax.lax.scan(body, cache, inputs)[1]


@pytest.fixture(scope="module", params=["zeros", "learned"])
def rows(request, config, batch):
    """(model, params, arguments of decode_rows, logits [B, R, L, V] of whole texts at once)."""
    config = dataclasses.replace(config, null_memory=request.param, posemb="learn")
    model, params = Captioner(config), random_params(config)
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 21, (8, ROWS, LENGTH)).astype(np.int32)
    texts, history = descend(tokens, rng.integers(0, ROWS, tokens.shape))
    images, others = batch["image"], batch["image"][::-1]

    @jax.jit
    def whole(params):
        found = []
        for group in GROUPS:
            memory = model.encode(params, others if group == "other" else images)
            memory = model.drop_memory(params, memory, jnp.full(8, group is None))
            repeated = jnp.repeat(memory, ROWS, axis=0)
            hidden = model.hidden(params, jnp.asarray(texts).reshape(-1, LENGTH), repeated)
            found.append(model.logits(params, hidden).reshape(8, ROWS, LENGTH, -1))
        return jnp.concatenate(found, axis=1)

    return model, params, (images, others, jnp.asarray(tokens), jnp.asarray(history)), whole(params)


def test_rows_that_descend_from_one_another(rows):
    """At the last position every ancestor has been asked for; before it, some texts differ."""
    model, params, args, want = rows
    found = decode_rows(model, params, *args)[-1]
    np.testing.assert_allclose(found, want[:, :, -1], rtol=1e-5, atol=2e-5)
    conditional, without, other = np.split(np.asarray(found)[..., :21], 3, axis=1)
    assert np.abs(conditional - without).max() > 1e-2
    assert np.abs(conditional - other).max() > 1e-2


def test_rows_of_their_own_need_no_ancestors(rows):
    model, params, (images, others, tokens, history), _ = rows
    own = jnp.broadcast_to(jnp.arange(ROWS)[None, None, :, None], history.shape)
    want = decode_rows(model, params, images, others, tokens, own)
    found = decode_rows(model, params, images, others, tokens, None)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-5)


def test_rows_on_a_mesh(rows):
    model, params, args, _ = rows
    want = decode_rows(model, params, *args)
    images, others, tokens, history = jax.device_get(args)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = place_batch(mesh, {"images": images, "others": others, "tokens": tokens})
        history = jax.device_put(history, jax.sharding.NamedSharding(mesh, HISTORY))
        params = place_tree(mesh, params, model.param_specs())
        found = decode_rows(model, params, *placed.values(), history)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-5)
