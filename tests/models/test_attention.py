"""Attention and its options against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.models import functional
from capjax.models.attention import CrossAttention, SelfAttention
from capjax.models.parameters import lecun_normal


def drawn(build):
    """(module, params) with every parameter random."""
    params = functional.init(build, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(treedef, noisy)
    return functional.merge(build, params), params


def layer_norm(x, scale):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6) * scale


def attention(query, key, value):
    logits = np.einsum("blnk,bsnk->bnls", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnls,bsnk->blnk", weights / weights.sum(-1, keepdims=True), value)


@pytest.fixture(scope="module")
def sequence():
    return jax.random.normal(jax.random.key(2), (2, 5, 16))


def test_qk_norm_of_self_attention(sequence):
    module, params = drawn(lambda: SelfAttention(16, 2, lecun_normal, use_bias=True, qk_norm=True))
    p = jax.tree.map(np.asarray, params)
    assert p["query_norm"]["scale"].shape == p["key_norm"]["scale"].shape == (8,)
    assert "bias" not in p["query_norm"] and "bias" not in p["key_norm"]
    qkv = np.einsum("bld,dnck->blnck", sequence, p["qkv"]["kernel"]) + p["qkv"]["bias"]
    query = layer_norm(qkv[:, :, :, 0], p["query_norm"]["scale"])
    key = layer_norm(qkv[:, :, :, 1], p["key_norm"]["scale"])
    attended = attention(query, key, qkv[:, :, :, 2])
    want = np.einsum("blnk,nkd->bld", attended, p["out"]["kernel"]) + p["out"]["bias"]
    np.testing.assert_allclose(module(sequence), want, rtol=1e-5, atol=1e-5)


def test_qk_norm_of_cross_attention(sequence):
    module, params = drawn(lambda: CrossAttention(16, 12, 2, lecun_normal, qk_norm=True))
    memory = jax.random.normal(jax.random.key(3), (2, 3, 12))
    p = jax.tree.map(np.asarray, params)
    query = np.einsum("bld,dnk->blnk", sequence, p["query"]["kernel"])
    key_value = np.einsum("bpd,dnck->bpnck", memory, p["key_value"]["kernel"])
    attended = attention(
        layer_norm(query, p["query_norm"]["scale"]),
        layer_norm(key_value[:, :, :, 0], p["key_norm"]["scale"]),
        key_value[:, :, :, 1],
    )
    want = np.einsum("blnk,nkd->bld", attended, p["out"]["kernel"])
    found = module(sequence, module.project_memory(memory))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_qk_norm_bounds_the_logits(sequence):
    """Whatever the scale of its input, a normalised query has the norm of its scale vector."""
    module, _ = drawn(lambda: SelfAttention(16, 2, lecun_normal, use_bias=False, qk_norm=True))
    small, large = (module.project(sequence * scale) for scale in (1.0, 1000.0))
    np.testing.assert_allclose(large[0], small[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(large[2], 1000 * small[2], rtol=1e-3, atol=1e-3)


def test_without_options_there_are_no_further_parameters():
    self_attention = SelfAttention(16, 2, lecun_normal, use_bias=False)
    cross_attention = CrossAttention(16, 12, 2, lecun_normal)
    assert set(functional.abstract_params(lambda: self_attention)) == {"qkv", "out"}
    assert set(functional.abstract_params(lambda: cross_attention)) == {"query", "key_value", "out"}


def test_qk_norm_keeps_the_compute_type(sequence):
    module, _ = drawn(lambda: SelfAttention(16, 2, lecun_normal, use_bias=True, qk_norm=True))
    assert module(sequence.astype(jnp.bfloat16)).dtype == jnp.bfloat16
