"""CoCa's text decoder: layers that read text alone, then layers that read text and image."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Bool, Float, Int
from capjax.mesh import act_BLD, act_XBLNK, embedding_LD, out_sharding
from capjax.models.attention import MASKED, SelfAttention, causal_bias
from capjax.models.decoder_block import DecoderBlock, attend_to_cache
from capjax.models.image_encoder import ImageEncoderConfig, sincos2d
from capjax.models.layers import Embedding, LayerNorm, Mlp
from capjax.models.parameters import broadcast, lecun_normal, normal, parameter, use, zeros
from capjax.models.stack import run_stack, stack
from capjax.models.text_decoder import DecoderCache, OutputHead, drop_memory, pad_to_lanes
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
        x_B1E: Float[Array, "B 1 E"],
        index: Int[Array, ""],
        layer: Int[Array, ""],
        keys_XBLNK: Array,
        values_XBLNK: Array,
    ) -> tuple[Array, Array, Array]:
        """One position; its key and value are written into the cache."""
        found_B1E, keys_XBLNK, values_XBLNK = attend_to_cache(
            self.self_attention, self.self_norm(x_B1E), index, layer, keys_XBLNK, values_XBLNK
        )
        x_B1E = x_B1E + found_B1E
        return x_B1E + self.mlp(self.mlp_norm(x_B1E)), keys_XBLNK, values_XBLNK


class CoCaDecoder(nnx.Module):
    """Decoder inputs (B, L) to text states, text embeddings, hidden states and logits.

    The cache is the captioner's: the text's keys and values of all layers, the unimodal ones first,
    and the memory's of the multimodal layers.
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
        x_BLE = self._embed(tokens_BL)
        class_11E = use(self.class_token, self.dtype)[None]
        class_B1E = broadcast(class_11E, (len(x_BLE), *class_11E.shape[1:]), act_BLD)
        x_BSE = jnp.concatenate([x_BLE, class_B1E], axis=1)
        x_BSE = self._unimodal(x_BSE, class_attention_bias(tokens_BL))
        class_BE = self.class_norm(x_BSE[:, -1:])[:, 0]
        return x_BSE[:, :-1], apply_projection(self.class_projection, class_BE)

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

    def start_cache(self, memory_BQD: Float[Array, "B Q D"], length: int) -> DecoderCache:
        """Keys and values of the memory for the multimodal layers, room for `length` tokens."""
        _, (keys_XBQNK, values_XBQNK) = lax.scan(
            lambda _, block: (None, block.cross_attention.project_memory(memory_BQD)),
            None,
            self.multimodal_blocks,
        )
        _, batch, _, num_heads, head_width = keys_XBQNK.shape
        empty_XBLNK = jnp.zeros(
            (sum(self.depths), batch, length, num_heads, head_width),
            keys_XBQNK.dtype,
            out_sharding=out_sharding(act_XBLNK),
        )
        return DecoderCache(empty_XBLNK, empty_XBLNK, keys_XBQNK, values_XBQNK)

    def decode_step(
        self, tokens_B: Int[Array, " B"], index: Int[Array, ""], cache: DecoderCache
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        """Logits of position `index`, whose decoder input is `tokens`, and the longer cache."""
        x_B1E = self.token_embedding(tokens_B[:, None], self.dtype)
        x_B1E += lax.dynamic_slice_in_dim(self.positions(), index, 1)[None]

        def body(carry, layer):
            x_B1E, keys_XBLNK, values_XBLNK = carry
            block, number, *memory = layer
            return block.decode_step(x_B1E, index, number, keys_XBLNK, values_XBLNK, *memory)

        unimodal, multimodal = self.depths
        memory = (cache.cross_key_XBPNK, cache.cross_value_XBPNK)
        carry = (x_B1E, cache.self_key_XBLNK, cache.self_value_XBLNK)
        for layers in (
            (self.unimodal_blocks, jnp.arange(unimodal)),
            (self.multimodal_blocks, unimodal + jnp.arange(multimodal), memory),
        ):
            carry = run_stack(body, carry, layers, scan=True)  # unrolled, parameters are copied
        x_B1E, keys_XBLNK, values_XBLNK = carry
        logits_BV = self.head(self.norm(x_B1E))[:, 0]
        return logits_BV, cache._replace(self_key_XBLNK=keys_XBLNK, self_value_XBLNK=values_XBLNK)

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
