"""The written-out backward passes equal automatic differentiation of the plain formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from capjax.models import Captioner, CaptionerConfig
from capjax.models.attention import MASKED, attend
from capjax.models.image_encoder import sincos2d
from capjax.models.layers import ACTIVATIONS, layer_norm
from capjax.models.parameters import broadcast


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def plain_layer_norm(x, scale, bias, eps):
    mean = jnp.mean(x, -1, keepdims=True)
    y = (x - mean) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + eps) * scale[None, None]
    return y if bias is None else y + bias[None, None]


def plain_attention(query, key, value, bias):
    logits = jnp.einsum("BLNK,BSNK->BNLS", query / np.sqrt(query.shape[-1]), key)
    if bias is not None:
        logits = jnp.where(bias == 0, logits, -jnp.inf)
    return jnp.einsum("BNLS,BSNK->BLNK", jax.nn.softmax(logits, -1), value)


def assert_same(ours, plain, *args):
    """Equal values, and equal gradients under a random cotangent."""
    found, pull = jax.vjp(ours, *args)
    want, plain_pull = jax.vjp(plain, *args)
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-6)
    cotangent = normal(9, *want.shape)
    for a, b in zip(pull(cotangent), plain_pull(cotangent), strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("bias", [normal(2, 7), None], ids=["bias", "no bias"])
def test_layer_norm(bias, eps):
    x = 3 + 0.1 * normal(0, 2, 5, 7)  # a mean far above the spread
    assert_same(
        lambda x, scale, bias: layer_norm(x, scale, bias, eps),
        lambda x, scale, bias: plain_layer_norm(x, scale, bias, eps),
        x,
        normal(1, 7),
        bias,
    )


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("gelu_tanh", lambda x: jax.nn.gelu(x, approximate=True)),
        ("gelu", lambda x: jax.nn.gelu(x, approximate=False)),
        ("quick_gelu", lambda x: x / (1 + jnp.exp(-1.702 * x))),
    ],
)
def test_activations(name, plain):
    x_RF = jnp.linspace(-6, 6, 2 * 3 * 101).reshape(2, 3, 101)
    assert_same(ACTIVATIONS[name], lambda x, _: plain(x), x_RF, None)
    assert_same(
        ACTIVATIONS[name], lambda x, bias: plain(x + bias[None, None]), x_RF, normal(3, 101)
    )


@pytest.mark.parametrize("masked", [True, False])
def test_attention(masked):
    query, key, value = normal(0, 2, 5, 3, 4), normal(1, 2, 5, 3, 4), normal(2, 2, 5, 3, 4)
    bias = jnp.where(jnp.tri(5, dtype=bool), 0, MASKED)[None, None] if masked else None
    assert_same(
        lambda q, k, v: attend(q, k, v, bias),
        lambda q, k, v: plain_attention(q, k, v, bias),
        query,
        key,
        value,
    )


@pytest.mark.parametrize("layer", ["layer_norm", "attention", *ACTIVATIONS])
def test_nothing_is_kept_in_float32(layer):
    """In bfloat16, no array as large as an activation waits for the backward pass in float32."""
    x = normal(0, 2, 5, 8, 16).astype(jnp.bfloat16)
    calls = {
        "layer_norm": lambda x: layer_norm(x[0], jnp.ones(16), None),
        **{name: functools.partial(call, bias=None) for name, call in ACTIVATIONS.items()},
        "attention": lambda x: attend(x, x, x),
    }
    y, pull = jax.vjp(calls[layer], x)
    assert y.dtype == jnp.bfloat16
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float32]
    assert all(leaf.size < x[0].size / 2 for leaf in kept)
    assert pull(y)[0].dtype == jnp.bfloat16


def test_what_many_rows_share_gets_a_gradient_summed_in_float32():
    """In bfloat16 a sum stands still at 256 times its terms; here there are 4096 of them."""
    shared = jnp.zeros((1, 1, 8), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda x: broadcast(x, (64, 64, 8), P()).sum(dtype=jnp.float32)))
    np.testing.assert_array_equal(gradient(shared), 4096)
    config = CaptionerConfig(
        image_size=8, patch_size=4, width=8, depth=1, num_heads=2, mlp_dim=8, vocab_size=9
    )
    params = Captioner(config).init(jax.random.key(0))

    def embed(params):
        module = Captioner(config).module(params).decoder.token_embedding
        return module(jnp.full((64, 64), 3), jnp.bfloat16).sum(dtype=jnp.float32)

    table_VE = jax.jit(jax.grad(embed))(params)["decoder"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(table_VE[3], 4096)


def test_fixed_positions():
    """By hand for a grid of 2 rows and 3 columns, 8 features: frequencies 1 and 1/10000."""
    table = sincos2d(2, 3, 8)
    assert table.shape == (6, 8)
    row, column = 1, 2
    want = [f(x * w) for x in (column, row) for f in (np.sin, np.cos) for w in (1, 1e-4)]
    np.testing.assert_allclose(table[row * 3 + column], want, rtol=1e-6)
