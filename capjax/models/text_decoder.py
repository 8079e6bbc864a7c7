"""The text decoder: causal or bidirectional self-attention, cross-attention to a memory, a cache.

The memory is what an encoder made of an image: its patches, and what stands beside them.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from capjax.dims import Array, Bool, Float, Int
from capjax.mesh import (
    act_BLD,
    act_BLNK,
    bias_V,
    embedding_LD,
    kernel_DV,
    replicated,
    reshard,
)
from capjax.models.attention import MASKED
from capjax.models.cache import LayerCache, ProjectedMemory, empty_cache, ready
from capjax.models.decoder_block import DecoderBlock, attention_bias
from capjax.models.image_encoder import sincos2d
from capjax.models.layers import Embedding, LayerNorm
from capjax.models.parameters import broadcast, normal, parameter, use, zeros
from capjax.models.stack import run_stack, stack, unstack

# (tokens_BS, index, cache, ancestors_BSL or None) -> (logits_BRV, hidden_BRE, cache)
DecodeStep = Callable[..., tuple[Array, Array, tuple[LayerCache, ...]]]


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

    def start_decoding(
        self,
        memories: Sequence[Float[Array, "B P D"] | None],
        batch: int,
        length: int,
        num_rows: int,
        dtype: DTypeLike,
    ) -> tuple[DecodeStep, tuple[LayerCache, ...]]:
        """See `Captioner.start_decoding`."""
        layers = [ready(block, dtype) for block in unstack(self.blocks)]
        seen = [see(layer, memories, self.null_memory, dtype) for layer in layers]
        embedding, norm, head = (
            ready(self.token_embedding, jnp.float32),
            self.norm,
            ready(self.head, dtype),
        )
        positions_LE = None if self.posemb == "rotary" else self.positions(dtype)

        def step(tokens_BS, index, cache, ancestors_BSL=None):
            index, x_BSE = jnp.asarray(index), embedding(tokens_BS, dtype)
            if positions_LE is not None:
                x_BSE += lax.dynamic_slice_in_dim(positions_LE, index, 1)[None]
            x_BRE = jnp.concatenate([x_BSE] * len(memories), axis=1)
            after = []
            for layer, kept, look in zip(layers, cache, seen, strict=True):
                x_BRE, kept = layer.decode_step(x_BRE, index, kept, look, ancestors_BSL)
                after.append(kept)
            hidden_BRE = norm(x_BRE)
            return head(hidden_BRE), hidden_BRE, tuple(after)

        num_heads, head_width = layers[0].self_attention.out.in_shape
        rows = num_rows * len(memories)
        empty = empty_cache(batch, num_heads, rows, length, head_width, dtype)
        return step, (empty,) * len(layers)


def see(
    block: DecoderBlock,
    memories: Sequence[Float[Array, "B P D"] | None],
    null_memory: nnx.Param | None,
    dtype: DTypeLike,
) -> list[ProjectedMemory | Array]:
    """What each group of rows finds in its memory: keys and values, or without one a constant."""

    def of_group(memory_BPD):
        if memory_BPD is not None:
            return block.project_memory(memory_BPD)
        width = block.cross_attention.key_value.in_shape[0]
        vector_D = jnp.zeros(width, dtype) if null_memory is None else use(null_memory, dtype)
        return block.find_constant(vector_D)

    return [of_group(memory_BPD) for memory_BPD in memories]


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
