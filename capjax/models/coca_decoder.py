"""CoCa's text decoder: layers that read text alone, then layers that read text and image."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Bool, Float, Int
from capjax.mesh import act_BLD, embedding_LD
from capjax.models.attention import MASKED, SelfAttention, causal_bias
from capjax.models.cache import LayerCache, attend_to_cache, empty_cache, ready
from capjax.models.decoder_block import DecoderBlock
from capjax.models.image_encoder import ImageEncoderConfig, sincos2d
from capjax.models.layers import Embedding, LayerNorm, Mlp
from capjax.models.parameters import broadcast, lecun_normal, normal, parameter, use, zeros
from capjax.models.stack import run_stack, stack, unstack
from capjax.models.text_decoder import DecodeStep, OutputHead, drop_memory, pad_to_lanes, see
from capjax.models.text_encoder import apply_projection, project_feature


def class_attention_bias(tokens_BL: Int[Array, "B L"]) -> Float[Array, "B 1 S S"]:
    """0 where a position may see another, `MASKED` elsewhere, for [decoder inputs, class token].

    Tokens see the tokens up to themselves. The class token, which stands last, sees itself and
    every token but padding; the first input is no padding though its id is the same.
    """
    length = tokens_BL.shape[1]
    is_padding_BL = (tokens_BL == PAD_ID) & (jnp.arange(length) > 0)[None]
    is_padding_BS = jnp.pad(is_padding_BL, ((0, 0), (0, 1)))
    is_class_S = jnp.arange(length + 1) == length
    hidden_BSS = is_class_S[None, :, None] & is_padding_BS[:, None, :]
    return jnp.where(hidden_BSS[:, None], MASKED, causal_bias(length + 1, length + 1))


class UnimodalBlock(nnx.Module):
    """Pre-norm self-attention and MLP: a decoder block without cross-attention."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        use_bias: bool,
        qk_norm: bool,
        activation: str,
        norm_eps: float,
        implementation: str,
    ):
        self.self_norm = LayerNorm(width, use_bias=use_bias, eps=norm_eps)
        self.self_attention = SelfAttention(
            width,
            num_heads,
            lecun_normal,
            use_bias=False,
            qk_norm=qk_norm,
            implementation=implementation,
            norm_eps=norm_eps,
        )
        self.mlp_norm = LayerNorm(width, use_bias=use_bias, eps=norm_eps)
        self.mlp = Mlp(width, mlp_dim, use_bias=use_bias, activation=activation)

    def __call__(
        self,
        x_BLE: Float[Array, "B L E"],
        bias_B1LL: Float[Array, "B 1 L L"] | None = None,
        *,
        is_causal: bool = False,
    ) -> Float[Array, "B L E"]:
        normed_BLE = self.self_norm(x_BLE)
        x_BLE = x_BLE + self.self_attention(normed_BLE, bias_B1LL, is_causal=is_causal)
        return x_BLE + self.mlp(self.mlp_norm(x_BLE))

    def decode_step(
        self,
        x_BSE: Float[Array, "B S E"],
        index: Int[Array, ""],
        cache: LayerCache,
        ancestors_BSL: Int[Array, "B S L"] | None,
    ) -> tuple[Float[Array, "B S E"], LayerCache]:
        """One position of every row, and the cache with its keys and values written in."""
        found_BSE, cache = attend_to_cache(
            self.self_attention, self.self_norm(x_BSE), index, cache, 1, ancestors_BSL
        )
        x_BSE = x_BSE + found_BSE
        return x_BSE + self.mlp(self.mlp_norm(x_BSE)), cache


class CoCaDecoder(nnx.Module):
    """Decoder inputs (B, L) to text states, text embeddings, hidden states and logits.

    The cache is that of the unimodal layers, then that of the multimodal ones.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        text_length: int,
        width: int,
        unimodal_depth: int,
        multimodal_depth: int,
        num_heads: int,
        mlp_dim: int,
        embedding_dim: int,
        posemb: str,
        use_bias: bool,
        qk_norm: bool,
        learned_null: bool,
        numerics: ImageEncoderConfig,
    ):
        self.token_embedding = Embedding(num_tokens, pad_to_lanes(num_tokens), width)
        self.position_embedding = (
            parameter(normal(width**-0.5), (text_length, width), embedding_LD)
            if posemb == "learn"
            else None
        )
        self.class_token = parameter(normal(1.0), (1, width), embedding_LD)  # as an embedded token
        self.class_norm = LayerNorm(width, eps=numerics.norm_eps)
        self.class_projection = project_feature(width, embedding_dim, use_bias=False)
        # At first the memory of zeros; its gradient, through the values, is not zero.
        self.null_memory = parameter(zeros, (numerics.width,)) if learned_null else None
        options: dict[str, Any] = {
            "use_bias": use_bias,
            "qk_norm": qk_norm,
            "activation": numerics.activation,
            "norm_eps": numerics.norm_eps,
            "implementation": numerics.attention,
        }
        unimodal = UnimodalBlock(width, num_heads, mlp_dim, **options)
        self.unimodal_blocks = stack(unimodal, unimodal_depth)
        multimodal = DecoderBlock(width, numerics.width, num_heads, mlp_dim, **options)
        self.multimodal_blocks = stack(multimodal, multimodal_depth)
        self.norm = LayerNorm(width, eps=numerics.norm_eps)
        self.head = OutputHead(width, num_tokens)
        self.text_length = text_length
        self.depths = (unimodal_depth, multimodal_depth)
        self.dtype, self.scan, self.remat = numerics.dtype, numerics.scan, numerics.remat

    def positions(self) -> Float[Array, "L E"]:
        """Position embeddings of the whole text length; the class token has none."""
        if self.position_embedding is not None:
            return use(self.position_embedding, self.dtype)
        width = self.class_token.shape[1]
        return jnp.asarray(sincos2d(1, self.text_length, width), self.dtype)

    def text(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B L E"]:
        """The tokens' states after the unimodal layers."""
        return self._unimodal(self._embed(tokens_BL), None)

    def text_and_class(
        self, tokens_BL: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B L E"], Float[Array, "B D"]]:
        """`text`, and the class token's state, normed and projected."""
        text_BLE, class_BE = self.text_and_class_state(tokens_BL)
        return text_BLE, apply_projection(self.class_projection, class_BE)

    def text_and_class_state(
        self, tokens_BL: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B L E"], Float[Array, "B E"]]:
        """`text`, and the class token's state, normed."""
        x_BLE = self._embed(tokens_BL)
        class_11E = use(self.class_token, self.dtype)[None]
        class_B1E = broadcast(class_11E, (len(x_BLE), *class_11E.shape[1:]), act_BLD)
        x_BSE = jnp.concatenate([x_BLE, class_B1E], axis=1)
        x_BSE = self._unimodal(x_BSE, class_attention_bias(tokens_BL))
        return x_BSE[:, :-1], self.class_norm(x_BSE[:, -1:])[:, 0]

    def hidden(
        self, text_BLE: Float[Array, "B L E"], memory_BQD: Float[Array, "B Q D"]
    ) -> Float[Array, "B L E"]:
        """States after the multimodal layers and the final LayerNorm."""
        x_BLE = run_stack(
            lambda x_BLE, block: block(x_BLE, memory_BQD, is_causal=True),
            text_BLE,
            self.multimodal_blocks,
            scan=self.scan,
            remat=self.remat,
        )
        return self.norm(x_BLE)

    def drop_memory(
        self, memory_BQD: Float[Array, "B Q D"], is_dropped_B: Bool[Array, " B"]
    ) -> Float[Array, "B Q D"]:
        """See `text_decoder.drop_memory`."""
        return drop_memory(self.null_memory, memory_BQD, is_dropped_B)

    def start_decoding(
        self,
        memories: Sequence[Float[Array, "B Q D"] | None],
        batch: int,
        length: int,
        num_rows: int,
    ) -> tuple[DecodeStep, tuple[LayerCache, ...]]:
        """See `Captioner.start_decoding`. The unimodal layers run once for all groups of rows."""
        dtype = self.dtype
        unimodal = [ready(block, dtype) for block in unstack(self.unimodal_blocks)]
        multimodal = [ready(block, dtype) for block in unstack(self.multimodal_blocks)]
        seen = [see(layer, memories, self.null_memory, dtype) for layer in multimodal]
        embedding, head = ready(self.token_embedding, jnp.float32), ready(self.head, dtype)
        positions_LE = self.positions()

        def step(tokens_BS, index, cache, ancestors_BSL=None):
            index, x_BSE = jnp.asarray(index), embedding(tokens_BS, dtype)
            x_BSE += lax.dynamic_slice_in_dim(positions_LE, index, 1)[None]
            after = []
            for layer, kept in zip(unimodal, cache, strict=False):
                x_BSE, kept = layer.decode_step(x_BSE, index, kept, ancestors_BSL)
                after.append(kept)
            x_BRE = jnp.concatenate([x_BSE] * len(memories), axis=1)
            for layer, kept, look in zip(multimodal, cache[len(unimodal) :], seen, strict=True):
                x_BRE, kept = layer.decode_step(x_BRE, index, kept, look, ancestors_BSL)
                after.append(kept)
            hidden_BRE = self.norm(x_BRE)
            return head(hidden_BRE), hidden_BRE, tuple(after)

        num_heads, head_width = unimodal[0].self_attention.out.in_shape

        def empty(rows):
            return empty_cache(batch, num_heads, rows, length, head_width, dtype)

        narrow, wide = empty(num_rows), empty(num_rows * len(memories))
        return step, (narrow,) * len(unimodal) + (wide,) * len(multimodal)

    def _embed(self, tokens_BL):
        x_BLE = self.token_embedding(tokens_BL, self.dtype)
        positions_1LE = self.positions()[None, : tokens_BL.shape[1]]
        return x_BLE + broadcast(positions_1LE, x_BLE.shape, act_BLD)

    def _unimodal(self, x_BLE, bias_B1LL):
        is_causal = bias_B1LL is None
        return run_stack(
            lambda x_BLE, block: block(x_BLE, bias_B1LL, is_causal=is_causal),
            x_BLE,
            self.unimodal_blocks,
            scan=self.scan,
            remat=self.remat,
        )
