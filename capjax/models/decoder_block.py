"""One layer of a text decoder, and which positions see which."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax import lax

from capjax.dims import Array, Bool, Float, Int
from capjax.models.attention import MASKED, CrossAttention, SelfAttention, attend, causal_bias
from capjax.models.layers import LayerNorm, Mlp
from capjax.models.parameters import lecun_normal


def attention_bias(
    length: int,
    is_parallel_B: Bool[Array, " B"] | None,
    is_padding_BL: Bool[Array, "B L"] | None = None,
) -> Float[Array, "#B 1 L L"]:
    """0 where position i may see position j, `MASKED` elsewhere.

    A causal row sees what is not after i and is no padding, a parallel row everything.
    """
    bias_B1LL = causal_bias(length, length)
    if is_padding_BL is not None:
        bias_B1LL = jnp.where(is_padding_BL[:, None, None, :], MASKED, bias_B1LL)
    if is_parallel_B is not None:
        bias_B1LL = jnp.where(is_parallel_B[:, None, None, None], 0.0, bias_B1LL)
    return bias_B1LL


class DecoderBlock(nnx.Module):
    """Pre-norm self-attention, cross-attention and MLP."""

    def __init__(
        self,
        width: int,
        memory_width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        use_bias: bool,
        qk_norm: bool = False,
        rotary: bool = False,
        activation: str = "gelu_tanh",
        norm_eps: float = 1e-6,
        implementation: str = "auto",
    ):
        self.self_norm = LayerNorm(width, use_bias=use_bias, eps=norm_eps)
        self.self_attention = SelfAttention(
            width,
            num_heads,
            lecun_normal,
            use_bias=False,
            qk_norm=qk_norm,
            rotary=rotary,
            implementation=implementation,
            norm_eps=norm_eps,
        )
        self.cross_norm = LayerNorm(width, use_bias=use_bias, eps=norm_eps)
        self.cross_attention = CrossAttention(
            width,
            memory_width,
            num_heads,
            lecun_normal,
            qk_norm=qk_norm,
            implementation=implementation,
            norm_eps=norm_eps,
        )
        self.mlp_norm = LayerNorm(width, use_bias=use_bias, eps=norm_eps)
        self.mlp = Mlp(width, mlp_dim, use_bias=use_bias, activation=activation)

    def __call__(
        self,
        x_BLE: Float[Array, "B L E"],
        memory_BPD: Float[Array, "B P D"],
        bias_B1LL: Float[Array, "#B 1 L L"] | None = None,
        *,
        is_causal: bool = False,
    ) -> Float[Array, "B L E"]:
        x_BLE, query_BLNK = self.before_memory(x_BLE, bias_B1LL, is_causal=is_causal)
        memory = self.cross_attention.project_memory(memory_BPD)
        return self.from_memory(x_BLE, query_BLNK, memory)

    def before_memory(
        self, x_BLE: Array, bias_B1LL: Array | None = None, *, is_causal: bool = False
    ) -> tuple[Float[Array, "B L E"], Float[Array, "B L N K"]]:
        """What does not depend on the memory: the sequence, and its queries of the memory."""
        normed_BLE = self.self_norm(x_BLE)
        x_BLE = x_BLE + self.self_attention(normed_BLE, bias_B1LL, is_causal=is_causal)
        return x_BLE, self.cross_attention.project_query(self.cross_norm(x_BLE))

    def from_memory(
        self, x_BLE: Array, query_BLNK: Array, memory: Sequence[Array]
    ) -> Float[Array, "B L E"]:
        """The rest, given the memory's keys and values."""
        x_BLE = x_BLE + self.cross_attention.attend(query_BLNK, memory)
        return x_BLE + self.mlp(self.mlp_norm(x_BLE))

    def decode_step(
        self,
        x_B1E: Float[Array, "B 1 E"],
        index: Int[Array, ""],
        layer: Int[Array, ""],
        keys_XBLNK: Array,
        values_XBLNK: Array,
        memory: Sequence[Array],
    ) -> tuple[Array, Array, Array]:
        """One position; its key and value are written into the cache."""
        found_B1E, keys_XBLNK, values_XBLNK = attend_to_cache(
            self.self_attention, self.self_norm(x_B1E), index, layer, keys_XBLNK, values_XBLNK
        )
        x_B1E = x_B1E + found_B1E
        query = self.cross_attention.project_query(self.cross_norm(x_B1E))
        return self.from_memory(x_B1E, query, memory), keys_XBLNK, values_XBLNK


def attend_to_cache(
    attention: SelfAttention,
    x_B1E: Float[Array, "B 1 E"],
    index: Int[Array, ""],
    layer: Int[Array, ""],
    keys_XBLNK: Array,
    values_XBLNK: Array,
) -> tuple[Array, Array, Array]:
    """`attention` of position `index` to those up to it, and the cache with it written in place."""
    query, key, value = attention.project(x_B1E, index)
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
    return attention.out(attended), keys_XBLNK, values_XBLNK
