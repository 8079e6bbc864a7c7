"""The text decoder: causal or bidirectional self-attention, cross-attention to patches, a cache."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from capjax.dims import Array, Bool, Float, Int
from capjax.mesh import act_XBLNK, bias_V, embedding_LD, kernel_DV, out_sharding
from capjax.models.attention import MASKED, CrossAttention, SelfAttention, attend
from capjax.models.image_encoder import sincos2d
from capjax.models.layers import Embedding, LayerNorm, Mlp
from capjax.models.parameters import lecun_normal, normal, parameter, use, zeros
from capjax.models.stack import run_stack, stack


class DecoderCache(NamedTuple):
    """Keys and values of all layers: of the text so far (preallocated), and of the patches."""

    self_key_XBLNK: Array
    self_value_XBLNK: Array
    cross_key_XBPNK: Array
    cross_value_XBPNK: Array


def attention_bias(
    length: int, is_parallel_B: Bool[Array, " B"] | None
) -> Float[Array, "#B 1 L L"]:
    """0 where position i may see position j, `MASKED` elsewhere: causal, or all when parallel."""
    visible_1LL = jnp.tril(jnp.ones((length, length), bool))[None]
    if is_parallel_B is not None:
        visible_1LL = visible_1LL | is_parallel_B[:, None, None]
    return jnp.where(visible_1LL, 0.0, MASKED)[:, None]


class DecoderBlock(nnx.Module):
    """Pre-norm self-attention, cross-attention and MLP."""

    def __init__(
        self, width: int, memory_width: int, num_heads: int, mlp_dim: int, *, use_bias: bool
    ):
        self.self_norm = LayerNorm(width, use_bias=use_bias)
        self.self_attention = SelfAttention(width, num_heads, lecun_normal, use_bias=False)
        self.cross_norm = LayerNorm(width, use_bias=use_bias)
        self.cross_attention = CrossAttention(width, memory_width, num_heads, lecun_normal)
        self.mlp_norm = LayerNorm(width, use_bias=use_bias)
        self.mlp = Mlp(width, mlp_dim, use_bias=use_bias)

    def __call__(
        self,
        x_BLE: Float[Array, "B L E"],
        patches_BPD: Float[Array, "B P D"],
        bias_B1LL: Float[Array, "#B 1 L L"],
    ) -> Float[Array, "B L E"]:
        x_BLE = x_BLE + self.self_attention(self.self_norm(x_BLE), bias_B1LL)
        return self._attend_and_mix(x_BLE, self.cross_attention.project_memory(patches_BPD))

    def decode_step(
        self,
        x_B1E: Float[Array, "B 1 E"],
        index: Int[Array, ""],
        layer: Int[Array, ""],
        keys_XBLNK: Array,
        values_XBLNK: Array,
        memory: Sequence[Array],
    ) -> tuple[Array, Array, Array]:
        """One position; its key and value are written into the cache in place."""
        query, key, value = self.self_attention.project(self.self_norm(x_B1E))
        start = (layer, 0, index, 0, 0)
        keys_XBLNK = lax.dynamic_update_slice(keys_XBLNK, key[None], start)
        values_XBLNK = lax.dynamic_update_slice(values_XBLNK, value[None], start)
        seen_L = jnp.arange(keys_XBLNK.shape[2]) <= index
        attended = attend(
            query,
            lax.dynamic_index_in_dim(keys_XBLNK, layer, keepdims=False),
            lax.dynamic_index_in_dim(values_XBLNK, layer, keepdims=False),
            jnp.where(seen_L, 0.0, MASKED)[None, None, None, :],
        )
        x_B1E = x_B1E + self.self_attention.out(attended)
        return self._attend_and_mix(x_B1E, memory), keys_XBLNK, values_XBLNK

    def _attend_and_mix(self, x_BLE, memory):
        x_BLE = x_BLE + self.cross_attention(self.cross_norm(x_BLE), memory)
        return x_BLE + self.mlp(self.mlp_norm(x_BLE))


class OutputHead(nnx.Module):
    """Hidden states to float32 logits over the padded vocabulary; zeros at first."""

    def __init__(self, width: int, num_tokens: int):
        columns = pad_to_lanes(num_tokens)
        self.kernel = parameter(zeros, (width, columns), kernel_DV, used=(width, num_tokens))
        self.bias = parameter(zeros, (columns,), bias_V, used=(num_tokens,))
        self.num_tokens = num_tokens

    def parameters(self) -> tuple[Float[Array, "E V"], Float[Array, " V"]]:
        """Kernel and bias, gathered; the bias of padded columns is `MASKED`."""
        kernel_EV, bias_V = use(self.kernel, jnp.float32), use(self.bias, jnp.float32)
        is_token_V = jnp.arange(bias_V.shape[0]) < self.num_tokens
        return kernel_EV, jnp.where(is_token_V, bias_V, MASKED)

    def __call__(self, hidden_BLE: Float[Array, "B L E"]) -> Float[Array, "B L V"]:
        kernel_EV, bias_V = self.parameters()
        logits_BLV = jnp.einsum(
            "BLE,EV->BLV",
            hidden_BLE,
            kernel_EV.astype(hidden_BLE.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits_BLV + bias_V[None, None, :]


class TextDecoder(nnx.Module):
    """Decoder inputs (B, L) and patches (B, P, D) to hidden states (B, L, E) and logits."""

    def __init__(
        self,
        *,
        num_tokens: int,
        num_embeddings: int,
        text_length: int,
        memory_width: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        posemb: str,
        use_bias: bool,
        scan: bool,
        remat: str,
    ):
        self.token_embedding = Embedding(num_embeddings, pad_to_lanes(num_embeddings), width)
        self.position_embedding = (
            parameter(normal(width**-0.5), (text_length, width), embedding_LD)
            if posemb == "learn"
            else None
        )
        block = DecoderBlock(width, memory_width, num_heads, mlp_dim, use_bias=use_bias)
        self.blocks = stack(block, depth)
        self.norm = LayerNorm(width)
        self.head = OutputHead(width, num_tokens)
        self.text_length = text_length
        self.scan = scan
        self.remat = remat

    def positions(self, dtype: DTypeLike) -> Float[Array, "L E"]:
        """Position embeddings of the whole text length."""
        if self.position_embedding is not None:
            return use(self.position_embedding, dtype)
        width = self.head.kernel.shape[0]
        return jnp.asarray(sincos2d(1, self.text_length, width), dtype)

    def hidden(
        self,
        tokens_BL: Int[Array, "B L"],
        patches_BPD: Float[Array, "B P D"],
        is_parallel_B: Bool[Array, " B"] | None,
    ) -> Float[Array, "B L E"]:
        """Hidden states after the final LayerNorm."""
        length = tokens_BL.shape[1]
        bias_B1LL = attention_bias(length, is_parallel_B)
        x_BLE = self.token_embedding(tokens_BL, patches_BPD.dtype)
        x_BLE += self.positions(patches_BPD.dtype)[None, :length]
        x_BLE = run_stack(
            lambda x_BLE, block: block(x_BLE, patches_BPD, bias_B1LL),
            x_BLE,
            self.blocks,
            scan=self.scan,
            remat=self.remat,
        )
        return self.norm(x_BLE)

    def start_cache(self, patches_BPD: Float[Array, "B P D"], length: int) -> DecoderCache:
        """Keys and values of the patches for every layer, and room for `length` tokens."""
        _, (keys_XBPNK, values_XBPNK) = lax.scan(
            lambda _, block: (None, block.cross_attention.project_memory(patches_BPD)),
            None,
            self.blocks,
        )
        depth, batch, _, num_heads, head_width = keys_XBPNK.shape
        empty_XBLNK = jnp.zeros(
            (depth, batch, length, num_heads, head_width),
            keys_XBPNK.dtype,
            out_sharding=out_sharding(act_XBLNK),
        )
        return DecoderCache(empty_XBLNK, empty_XBLNK, keys_XBPNK, values_XBPNK)

    def decode_step(
        self, tokens_B: Int[Array, " B"], index: Int[Array, ""], cache: DecoderCache
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        """Logits of position `index`, whose decoder input is `tokens`, and the longer cache."""
        dtype = cache.self_key_XBLNK.dtype
        x_B1E = self.token_embedding(tokens_B[:, None], dtype)
        x_B1E += lax.dynamic_slice_in_dim(self.positions(dtype), index, 1)[None]

        def body(carry, layer):
            x_B1E, keys_XBLNK, values_XBLNK = carry
            block, number, memory = layer
            return block.decode_step(x_B1E, index, number, keys_XBLNK, values_XBLNK, memory)

        depth = cache.self_key_XBLNK.shape[0]
        memory = (cache.cross_key_XBPNK, cache.cross_value_XBPNK)
        x_B1E, keys_XBLNK, values_XBLNK = run_stack(
            body,
            (x_B1E, cache.self_key_XBLNK, cache.self_value_XBLNK),
            (self.blocks, jnp.arange(depth), memory),
            scan=True,  # unrolled, every step would copy every layer's parameters out of the stack
        )
        logits_BV = self.head(self.norm(x_B1E))[:, 0]
        return logits_BV, cache._replace(self_key_XBLNK=keys_XBLNK, self_value_XBLNK=values_XBLNK)


def pad_to_lanes(size: int) -> int:
    """`size` rounded up to a multiple of 128, the width of a TPU's lanes."""
    return -(-size // 128) * 128
