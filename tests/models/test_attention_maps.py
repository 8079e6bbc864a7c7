"""Attention maps against what every attention of a pass over the model was called with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.mesh import MeshShape, make_mesh, place_batch, place_tree
from capjax.models import attention
from capjax.models.attention_maps import attention_maps
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.coca import CoCa, CoCaConfig

SIZES = {
    "image_size": 8,
    "patch_size": 4,
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "mlp_dim": 16,
    "decoder_depth": 2,
    "num_registers": 3,
    "vocab_size": 21,
    "text_length": 6,
}
MODELS = {
    "captioner": Captioner(CaptionerConfig(**SIZES)),
    "rotary": Captioner(CaptionerConfig(**SIZES, decoder_posemb="rotary", decoder_qk_norm=True)),
    "coca": CoCa(CoCaConfig(**SIZES, caption_queries=5)),
}
LABELS = np.array([[5, 6, 7, 1, 0, 0], [9, 8, 1, 0, 0, 0]], np.int32)


def drawn(model):
    """(params of sizes that move everything, images)."""
    rng = np.random.default_rng(1)
    shapes = model.abstract_params()
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)
    return params, jnp.asarray(rng.integers(0, 256, (2, 8, 8, 3)), jnp.uint8)


def softmax(query_BLNK, key_BPNK):
    logits = np.einsum("blnk,bpnk->bnlp", query_BLNK, key_BPNK) / query_BLNK.shape[-1] ** 0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", MODELS)
def test_they_are_the_weights_that_the_model_uses(name, monkeypatch):
    model = MODELS[name]
    params, images = drawn(model)
    found = attention_maps(model, params, images, jnp.asarray(LABELS))
    assert found.shape == (2, 1 if name == "coca" else 2, 2, 6, 4 + 3)
    np.testing.assert_allclose(np.sum(found, -1), 1.0, rtol=1e-5)

    calls, attend = [], attention.attend

    def spy(query, key, value, *args, **kwargs):
        calls.append((np.asarray(query), np.asarray(key)))
        return attend(query, key, value, *args, **kwargs)

    monkeypatch.setattr(attention, "attend", spy)
    plain = type(model)(dataclasses.replace(model.config, scan=False))
    inputs = jnp.asarray(np.pad(LABELS[:, :-1], ((0, 0), (1, 0))))
    plain.hidden(params, inputs, plain.encode(params, images))
    lengths = [(query.shape[1], key.shape[1]) for query, key in calls]
    if name == "coca":
        assert lengths == [(7, 7), (5, 7), (6, 6), (6, 6), (6, 5)]
        pooled = softmax(*calls[1]).mean(1)
        want = np.einsum("bnlq,bqp->bnlp", softmax(*calls[-1]), pooled)[:, None]
    else:
        assert lengths == [(7, 7), (6, 6), (6, 7), (6, 6), (6, 7)]
        want = np.stack([softmax(*calls[2]), softmax(*calls[4])], axis=1)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


def test_on_a_mesh():
    model = MODELS["captioner"]
    params, images = drawn(model)
    want = attention_maps(model, params, images, jnp.asarray(LABELS))
    mesh = make_mesh(MeshShape(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = place_batch(mesh, {"images": np.asarray(images), "labels": LABELS})
        there = place_tree(mesh, params, model.param_specs())
        found = attention_maps(model, there, placed["images"], placed["labels"])
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)
