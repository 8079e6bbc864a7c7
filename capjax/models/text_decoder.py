"""The text decoder: causal or bidirectional self-attention, cross-attention to a memory, a cache.

The memory is what an encoder made of an image: its patches, and what stands beside them.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from capjax.dims import Array, Bool, Float, Int
from capjax.mesh import (
    act_BLD,
    act_BLNK,
    act_XBLNK,
    bias_V,
    embedding_LD,
    kernel_DV,
    out_sharding,
    replicated,
    reshard,
)
from capjax.models.attention import MASKED
from capjax.models.decoder_block import DecoderBlock, attention_bias
from capjax.models.image_encoder import sincos2d
from capjax.models.layers import Embedding, LayerNorm
from capjax.models.parameters import broadcast, normal, parameter, use, zeros
from capjax.models.stack import run_stack, stack


class DecoderCache(NamedTuple):
    """Keys and values of all layers: of the text so far (preallocated), and of the patches."""

    self_key_XBLNK: Array
    self_value_XBLNK: Array
    cross_key_XBPNK: Array
    cross_value_XBPNK: Array


class OutputHead(nnx.Module):
    """Hidden states to float32 logits over the padded vocabulary; zeros at first."""

    def __init__(self, width: int, num_tokens: int):
        columns = pad_to_lanes(num_tokens)
        self.kernel = parameter(zeros, (width, columns), kernel_DV, used=(width, num_tokens))
        self.bias = parameter(zeros, (columns,), bias_V, used=(num_tokens,))
        self.num_tokens = num_tokens

    def parameters(self) -> tuple[Float[Array, "E V"], Float[Array, " V"]]:
        """Kernel and bias as stored; the bias of padded columns is `MASKED`."""
        bias_V = self.bias[...]
        is_token_V = jnp.arange(bias_V.shape[0]) < self.num_tokens
        return self.kernel[...], jnp.where(is_token_V, bias_V, MASKED)

    def __call__(self, hidden_BLE: Float[Array, "B L E"]) -> Float[Array, "B L V"]:
        _, bias_V = self.parameters()
        logits_BLV = jnp.einsum(
            "BLE,EV->BLV",
            hidden_BLE,
            use(self.kernel, hidden_BLE.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits_BLV + bias_V[None, None, :]


class TextDecoder(nnx.Module):
    """Decoder inputs (B, L) and a memory (B, P, D) to hidden states (B, L, E) and logits.

    Positions are learned or fixed vectors, added to the inputs, or rotary ones. Those show in the
    weights of attention alone, so equal inputs that all see each other would remain equal: where
    they are rotary, a mask token (and no other) still has a learned vector for its position.
    """

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
        qk_norm: bool,
        activation: str,
        norm_eps: float,
        learned_null: bool,
        attention: str,
        scan: bool,
        remat: str,
    ):
        self.token_embedding = Embedding(num_embeddings, pad_to_lanes(num_embeddings), width)
        has_mask = num_embeddings > num_tokens
        is_learned = posemb == "learn" or (posemb == "rotary" and has_mask)
        self.position_embedding = (
            parameter(normal(width**-0.5), (text_length, width), embedding_LD)
            if is_learned
            else None
        )
        # Zeros, so that at first it is the memory of zeros; its gradient, through the values, is
        # not zero.
        self.null_memory = parameter(zeros, (memory_width,)) if learned_null else None
        block = DecoderBlock(
            width,
            memory_width,
            num_heads,
            mlp_dim,
            use_bias=use_bias,
            qk_norm=qk_norm,
            rotary=posemb == "rotary",
            activation=activation,
            norm_eps=norm_eps,
            implementation=attention,
        )
        self.blocks = stack(block, depth)
        self.norm = LayerNorm(width, eps=norm_eps)
        self.head = OutputHead(width, num_tokens)
        self.mask_id = num_tokens
        self.posemb = posemb
        self.text_length = text_length
        self.scan = scan
        self.remat = remat

    def positions(self, dtype: DTypeLike) -> Float[Array, "L E"]:
        """Position embeddings of the whole text length."""
        if self.position_embedding is not None:
            return use(self.position_embedding, dtype)
        width = self.head.kernel.shape[0]
        return jnp.asarray(sincos2d(1, self.text_length, width), dtype)

    def embed(self, tokens_BL: Int[Array, "B L"], dtype: DTypeLike) -> Float[Array, "B L E"]:
        """The first layer's input."""
        x_BLE = self.token_embedding(tokens_BL, dtype)
        if self.posemb == "rotary" and self.position_embedding is None:
            return x_BLE
        positions_1LE = self.positions(dtype)[None, : tokens_BL.shape[1]]
        positions_BLE = broadcast(positions_1LE, x_BLE.shape, act_BLD)
        if self.posemb == "rotary":
            is_mask_BL1 = (tokens_BL == self.mask_id)[:, :, None]
            return x_BLE + jnp.where(is_mask_BL1, positions_BLE, 0)
        return x_BLE + positions_BLE

    def hidden(
        self,
        tokens_BL: Int[Array, "B L"],
        memory_BPD: Float[Array, "B P D"],
        is_parallel_B: Bool[Array, " B"] | Literal[True] | None,
        is_padding_BL: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B L E"]:
        """Hidden states after the final LayerNorm; for the masks see `attention_bias`."""
        is_causal = is_parallel_B is None and is_padding_BL is None
        bias_B1LL = None
        if not is_causal and is_parallel_B is not True:
            bias_B1LL = attention_bias(tokens_BL.shape[1], is_parallel_B, is_padding_BL)
        x_BLE = run_stack(
            lambda x_BLE, block: block(x_BLE, memory_BPD, bias_B1LL, is_causal=is_causal),
            self.embed(tokens_BL, memory_BPD.dtype),
            self.blocks,
            scan=self.scan,
            remat=self.remat,
        )
        return self.norm(x_BLE)

    def parallel_hidden(
        self, memory_BPD: Float[Array, "B P D"], length: int
    ) -> Float[Array, "B L E"]:
        """`hidden` of mask tokens in parallel rows.

        Up to its queries of the memory the first layer is the same in every row, so that much is
        computed for one row, which is on every device.
        """
        batch, dtype = memory_BPD.shape[0], memory_BPD.dtype
        table_VE = reshard(self.token_embedding.embedding[...], replicated)
        mask_11E = table_VE[self.mask_id].astype(dtype)[None, None]
        x_1LE = mask_11E + self.positions(dtype)[None, :length]

        def first(_, block):
            x_1LE_, query_1LNK = block.before_memory(x_1LE)
            x_BLE = broadcast(x_1LE_, (batch, *x_1LE_.shape[1:]), act_BLD)
            query_BLNK = broadcast(query_1LNK, (batch, *query_1LNK.shape[1:]), act_BLNK)
            memory = block.cross_attention.project_memory(memory_BPD)
            return block.from_memory(x_BLE, query_BLNK, memory)

        x_BLE = run_stack(
            lambda x_BLE, block: block(x_BLE, memory_BPD),
            None,
            self.blocks,
            scan=self.scan,
            remat=self.remat,
            first=first,
        )
        return self.norm(x_BLE)

    def drop_memory(
        self, memory_BPD: Float[Array, "B P D"], is_dropped_B: Bool[Array, " B"]
    ) -> Float[Array, "B P D"]:
        """See `drop_memory`."""
        return drop_memory(self.null_memory, memory_BPD, is_dropped_B)

    def start_cache(self, memory_BPD: Float[Array, "B P D"], length: int) -> DecoderCache:
        """Keys and values of the memory for every layer, and room for `length` tokens."""
        _, (keys_XBPNK, values_XBPNK) = lax.scan(
            lambda _, block: (None, block.cross_attention.project_memory(memory_BPD)),
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
        if self.posemb != "rotary":
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


def drop_memory(
    null_memory: nnx.Param | None,
    memory_BPD: Float[Array, "B P D"],
    is_dropped_B: Bool[Array, " B"],
) -> Float[Array, "B P D"]:
    """The memory, in dropped rows replaced by the learned vector, or by zeros."""
    null_BPD = jnp.zeros((), memory_BPD.dtype)
    if null_memory is not None:
        null_11D = use(null_memory, memory_BPD.dtype)[None, None]
        null_BPD = broadcast(null_11D, memory_BPD.shape, act_BLD)
    return jnp.where(is_dropped_B[:, None, None], null_BPD, memory_BPD)


def pad_to_lanes(size: int) -> int:
    """`size` rounded up to a multiple of 128, the width of a TPU's lanes."""
    return -(-size // 128) * 128
