"""Causal self-attention whose queries share keys and values in groups, after a common prompt.

As in Llama: heads of queries come in groups of G to one head of keys and values, and positions turn
neighbours in a head (the order of GGUF files; `rotary` turns its two halves). Rows that attend
stand in Q sets of S, each set with keys of its own, as in `cache`. What all texts of a batch have
before them, the prompt of P tokens, is kept and read once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from capjax.dims import Array, Float, Int
from capjax.mesh import BATCH, out_sharding
from capjax.models.attention import MASKED, causal_bias
from capjax.models.cache import LayerCache
from capjax.models.layers import Projection
from capjax.models.parameters import lecun_normal


class LayerPrompt(NamedTuple):
    """Keys and values of the prompt in one layer, of which `length` positions are in use."""

    key_NPK: Float[Array, "N P K"]
    value_NPK: Float[Array, "N P K"]
    length: Int[Array, ""]


def turn(x: Array, position_L: Int[Array, " L"], base: float) -> Array:
    """Turns pairs (2k, 2k + 1) of x [B, L, ..., K] by position * base ** (-2k / K), in float32."""
    half = x.shape[-1] // 2
    frequency_H = base ** -(np.arange(half, dtype=np.float32) / half)
    angle_LH = position_L.astype(jnp.float32)[:, None] * frequency_H[None, :]
    angle = angle_LH.reshape(1, len(position_L), *(1,) * (x.ndim - 3), half)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], half, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = (a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle))
    return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)


class GroupedAttention(nnx.Module):
    """Self-attention with `num_kv_heads` heads of keys and values; every parameter replicated."""

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, head_width: int, rotary_base: float
    ):
        def project(in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> Projection:
            whole = P(*(None,) * (len(in_shape) + len(out_shape)))
            law = lecun_normal(int(np.prod(in_shape)), int(np.prod(out_shape)))
            return Projection(in_shape, out_shape, whole, law, use_bias=False)

        heads = (num_kv_heads, num_heads // num_kv_heads, head_width)
        self.query = project((width,), heads)
        self.key = project((width,), (num_kv_heads, head_width))
        self.value = project((width,), (num_kv_heads, head_width))
        self.out = project(heads, (width,))
        self.rotary_base = rotary_base

    def project(self, x_BLD: Float[Array, "B L D"], position_L: Int[Array, " L"]) -> list[Array]:
        """Queries (B, L, N, G, K), keys and values (B, L, N, K) of the positions."""
        turned = functools.partial(turn, position_L=position_L, base=self.rotary_base)
        return [turned(self.query(x_BLD)), turned(self.key(x_BLD)), self.value(x_BLD)]

    def __call__(
        self, x_BLD: Float[Array, "B L D"], prompt: LayerPrompt
    ) -> tuple[Float[Array, "B L D"], LayerPrompt]:
        """Whole texts after the prompt; and their keys and values, of the first text of the batch.

        Those are the prompt of others, where this text is one.
        """
        length = x_BLD.shape[1]
        position_L = prompt.length + jnp.arange(length)
        query_BLNGK, *new_BLNK = self.project(x_BLD, position_L)
        key_BNLK, value_BNLK = (x.transpose(0, 2, 1, 3) for x in new_BLNK)
        cache = LayerCache(key_BNLK[:, :, None], value_BNLK[:, :, None])
        bias = causal_bias(length, length)[:, :, None, None]
        found_BLD = self.out(_attend(query_BLNGK, cache, 1, bias, prompt))
        return found_BLD, LayerPrompt(key_BNLK[0], value_BNLK[0], jnp.int32(length))

    def decode_step(
        self,
        x_BSD: Float[Array, "B S D"],
        index: Int[Array, ""],
        cache: LayerCache,
        ancestors_BSL: Int[Array, "B S L"] | None,
        prompt: LayerPrompt,
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """Position `index` of each row, and the cache with it written in; see `cache`."""
        num_rows, length = x_BSD.shape[1], cache.key_BNRLK.shape[3]
        position_S = jnp.full(num_rows, prompt.length + index)
        query_BSNGK, *new_BSNK = self.project(x_BSD, position_S)

        def write(old_BNSLK, new_BSNK):
            new_BNS1K = new_BSNK.transpose(0, 2, 1, 3)[:, :, :, None]
            return lax.dynamic_update_slice(old_BNSLK, new_BNS1K, (0, 0, 0, index, 0))

        cache = LayerCache(*map(write, cache, new_BSNK))
        is_past_L = jnp.arange(length) <= index
        if ancestors_BSL is None:
            bias = jnp.where(is_past_L, 0.0, MASKED)[None, None, None, None, None, :]
            return self.out(_attend(query_BSNGK, cache, num_rows, bias, prompt)), cache
        rows_S = jnp.arange(num_rows)
        is_ancestor_BSSL = ancestors_BSL[:, :, None, :] == rows_S[None, None, :, None]
        is_seen_BSSL = is_ancestor_BSSL & is_past_L[None, None, None, :]
        bias_B111ST = jnp.where(is_seen_BSSL, 0.0, MASKED).reshape(
            *(len(x_BSD), 1, 1, 1, num_rows, num_rows * length),
            out_sharding=out_sharding(P(BATCH, None, None, None, None, None)),
        )
        return self.out(_attend(query_BSNGK, cache, 1, bias_B111ST, prompt)), cache


def _attend(
    query_BRNGK: Array,
    cache: LayerCache,
    num_sets: int,
    bias: Float[Array, "#B 1 1 1 #S T"],
    prompt: LayerPrompt,
) -> Float[Array, "B R N G K"]:
    """One softmax over the prompt, which all see, and the keys of each set of rows."""
    batch, _, *heads = query_BRNGK.shape
    num_kv_heads, _, head_width = heads
    whole = out_sharding(P(BATCH, None, None, None, None, None))
    query_BQSNGK = query_BRNGK.reshape(batch, num_sets, -1, *heads, out_sharding=whole)
    query_BQSNGK *= jnp.asarray(head_width**-0.5, query_BRNGK.dtype)
    spec_BNQTK = out_sharding(P(BATCH, None, None, None, None))
    key_BNQTK, value_BNQTK = (
        x.reshape(batch, num_kv_heads, num_sets, -1, head_width, out_sharding=spec_BNQTK)
        for x in cache
    )
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    own_BNQGST = einsum("BQSNGK,BNQTK->BNQGST", query_BQSNGK, key_BNQTK) + bias
    shared_BNQGSP = einsum("BQSNGK,NPK->BNQGSP", query_BQSNGK, prompt.key_NPK)
    num_shared = shared_BNQGSP.shape[-1]
    is_prompt_P = jnp.arange(num_shared) < prompt.length
    shared_BNQGSP += jnp.where(is_prompt_P, 0.0, MASKED)[None, None, None, None, None, :]
    weights = jax.nn.softmax(jnp.concatenate([shared_BNQGSP, own_BNQGST], axis=-1), -1)
    weights = weights.astype(value_BNQTK.dtype)
    found_BQSNGK = jnp.einsum("BNQGST,BNQTK->BQSNGK", weights[..., num_shared:], value_BNQTK)
    found_BQSNGK += jnp.einsum("BNQGSP,NPK->BQSNGK", weights[..., :num_shared], prompt.value_NPK)
    return found_BQSNGK.reshape(
        query_BRNGK.shape, out_sharding=out_sharding(P(BATCH, None, None, None, None))
    )
