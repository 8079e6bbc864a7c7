"""CoCa: one image encoder and one text decoder that both caption and contrast.

The first layers of the decoder read text alone, the others image and text. A class token behind the
text, seen by no token, gives the text's embedding; the captions read pooled image tokens, and the
image's embedding is pooled from those again (the cascade). So one pass serves both losses.

Source: Yu et al., "CoCa: Contrastive Captioners are Image-Text Foundation Models" (2022). Where it
is silent, layers and laws of initialisation are those of the captioner. CoCa-Base (ViT-B/18 at
288 px, 12 + 12 decoder layers of width 768, 256 queries, V = 64,000) has 388.7 M parameters;
without the poolers and the projections, which are 6.1 M, they are the paper's 383 M.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Bool, Float, Int, Params, UInt8
from capjax.errors import UserError
from capjax.models.attentional_pooler import AttentionalPooler, pooler_flops
from capjax.models.cache import LayerCache
from capjax.models.coca_decoder import CoCaDecoder
from capjax.models.functional import PureModel
from capjax.models.image_encoder import (
    ImageEncoder,
    ImageEncoderConfig,
    encoder_flops,
    normalize,
    stack_flops,
)
from capjax.models.pooling import unit_norm
from capjax.models.text_decoder import DecodeStep
from capjax.models.text_encoder import apply_projection, project_feature
from capjax.models.two_towers import ContrastiveScale


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoCaConfig(ImageEncoderConfig):
    """Sizes and numerics of a CoCa, beside those of its image encoder.

    Attributes:
      vocab_size: tokens that can be predicted. There is no mask token.
      text_length: tokens of a caption, its end included; the class token comes on top.
      decoder_width: like the three fields after it, 0 stands for the encoder's and becomes it.
      decoder_depth: layers of text, those without and those with cross-attention.
      unimodal_depth: how many of them, the first ones, have none; 0 stands for half.
      decoder_bias: biases in the decoder's MLPs and LayerNorms (its attention never has any).
      decoder_posemb: positions of the text: "learn", "sincos2d", or "" for `posemb`.
      decoder_qk_norm: LayerNorm of queries and keys in the decoder.
      null_memory: what captions see where the image is dropped: "zeros", or one "learned" vector.
      caption_queries: image tokens that the captions see.
      embedding_dim: width of the image's and the text's embedding; 0 stands for decoder_width.
      logit_scale_init: log of the factor on the cosine of two embeddings; CLIP's is ln(1 / 0.07).
    """

    vocab_size: int
    text_length: int = 64
    decoder_width: int = 0
    decoder_depth: int = 0
    decoder_num_heads: int = 0
    decoder_mlp_dim: int = 0
    unimodal_depth: int = 0
    decoder_bias: bool = False
    decoder_posemb: str = ""
    decoder_qk_norm: bool = False
    null_memory: str = "zeros"
    caption_queries: int = 256
    embedding_dim: int = 0
    logit_scale_init: float = math.log(1 / 0.07)
    mask_token: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("width", "depth", "num_heads", "mlp_dim"):
            self._fill(f"decoder_{name}", getattr(self, name))
        self._fill("unimodal_depth", self.decoder_depth // 2)
        self._fill("embedding_dim", self.decoder_width)
        self.check_at_least_one(
            "vocab_size", "text_length", "decoder_width", "decoder_num_heads", "decoder_mlp_dim"
        )
        self.check_at_least_one("caption_queries", "embedding_dim")
        self.check_choice("decoder_posemb", ("", "learn", "sincos2d"))
        self.check_choice("null_memory", ("zeros", "learned"))
        self.check_heads("decoder_", self.decoder_posemb or self.posemb)
        if not 1 <= self.unimodal_depth < self.decoder_depth:
            raise UserError(
                f"unimodal_depth={self.unimodal_depth} of decoder_depth={self.decoder_depth} "
                "layers: expected 1 or more of both kinds"
            )

    def _fill(self, name: str, value: int) -> None:
        if not getattr(self, name):
            object.__setattr__(self, name, value)


class CoCaModule(nnx.Module):
    """Encoder, poolers, decoder and logit scale; used through `CoCa`."""

    def __init__(self, config: CoCaConfig):
        self.encoder = ImageEncoder(config)
        self.caption_pooler = AttentionalPooler(config.caption_queries, config)
        self.contrastive_pooler = AttentionalPooler(1, config)
        self.image_projection = project_feature(config.width, config.embedding_dim, use_bias=False)
        self.decoder = CoCaDecoder(
            num_tokens=config.vocab_size,
            text_length=config.text_length,
            width=config.decoder_width,
            unimodal_depth=config.unimodal_depth,
            multimodal_depth=config.decoder_depth - config.unimodal_depth,
            num_heads=config.decoder_num_heads,
            mlp_dim=config.decoder_mlp_dim,
            embedding_dim=config.embedding_dim,
            posemb=config.decoder_posemb or config.posemb,
            use_bias=config.decoder_bias,
            qk_norm=config.decoder_qk_norm,
            learned_null=config.null_memory == "learned",
            numerics=config,
        )
        self.contrastive = ContrastiveScale(config.logit_scale_init, None)


@dataclasses.dataclass(frozen=True)
class CoCa(PureModel):
    """A CoCa of one configuration. Methods are pure functions of `params`, a nested dict.

    It captions as a `Captioner` does, by methods of the same names; its memory is what the
    captions see of an image, (B, caption_queries, width).
    """

    config: CoCaConfig
    module_class: ClassVar[type] = CoCaModule
    # Patterns of the parameters that embed texts, and that no image goes through.
    text_side: ClassVar[tuple[str, ...]] = (
        r"decoder/(token_embedding|position_embedding|unimodal_blocks|class_\w+)",
        "contrastive",
    )

    @property
    def mask_id(self) -> int:
        """No token's id, for there is no mask token; what scores captions asks every model."""
        return self.config.vocab_size

    def encode(
        self, params: Params, images_BHWC: UInt8[Array, "B H W C"] | Float[Array, "B H W C"]
    ) -> Float[Array, "B Q D"]:
        """The memory of images, which are uint8, or floats in [-1, 1]."""
        module = self.module(params)
        return module.caption_pooler(module.encoder(normalize(images_BHWC, self.config)))

    def pooled(self, params: Params, memory_BQD: Float[Array, "B Q D"]) -> Float[Array, "B D"]:
        """The image's feature before the projection, pooled from the memory."""
        return self.module(params).contrastive_pooler(memory_BQD)[:, 0]

    def embed_image(
        self, params: Params, memory_BQD: Float[Array, "B Q D"]
    ) -> Float[Array, "B embedding"]:
        """Float32 embeddings of length 1, of what `encode` gave."""
        projection = self.module(params).image_projection
        return unit_norm(apply_projection(projection, self.pooled(params, memory_BQD)))

    def drop_memory(
        self, params: Params, memory_BQD: Float[Array, "B Q D"], is_dropped_B: Bool[Array, " B"]
    ) -> Float[Array, "B Q D"]:
        """The memory, in dropped rows replaced by what stands for no image (`null_memory`)."""
        return self.module(params).decoder.drop_memory(memory_BQD, is_dropped_B)

    def embed_text(
        self, params: Params, tokens_TL: Int[Array, "T L"]
    ) -> Float[Array, "T embedding"]:
        """Float32 embeddings of length 1 of captions as the tokenizer encodes them (the labels).

        The last of the `text_length` tokens, which is EOS in a caption that fills them, is not
        read: so the vectors are those of the training pass, whose inputs are the labels shifted.
        """
        return self.project_text(params, self.text_feature(params, tokens_TL))

    def project_text(
        self, params: Params, feature_TD: Float[Array, "T D"]
    ) -> Float[Array, "T embedding"]:
        """Float32 embeddings of length 1, of what `text_feature` gave."""
        projection = self.module(params).decoder.class_projection
        return unit_norm(apply_projection(projection, feature_TD))

    def text_feature(self, params: Params, tokens_TL: Int[Array, "T L"]) -> Float[Array, "T E"]:
        """The text's feature before the projection; of what `embed_text` reads."""
        inputs_TL = jnp.pad(tokens_TL[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID)
        self._check_length(inputs_TL.shape[1])
        return self.module(params).decoder.text_and_class_state(inputs_TL)[1]

    def hidden_and_text(
        self, params: Params, tokens_BL: Int[Array, "B L"], memory_BQD: Float[Array, "B Q D"]
    ) -> tuple[Float[Array, "B L E"], Float[Array, "B embedding"]]:
        """`hidden` and `embed_text` in one pass over the decoder inputs `tokens_BL`."""
        self._check_length(tokens_BL.shape[1])
        decoder = self.module(params).decoder
        text_BLE, class_BD = decoder.text_and_class(tokens_BL)
        return decoder.hidden(text_BLE, memory_BQD), unit_norm(class_BD)

    def logit_scale_and_bias(self, params: Params) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """By what cosines are multiplied to make logits of them, and what is added: 0."""
        return self.module(params).contrastive()

    def hidden(
        self,
        params: Params,
        tokens_BL: Int[Array, "B L"],
        memory_BQD: Float[Array, "B Q D"],
        is_parallel_B: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B L E"]:
        """The decoder's states after its final LayerNorm; `tokens_BL` are labels shifted right.

        Raises `UserError` for `is_parallel_B`: a CoCa reads from left to right only.
        """
        if is_parallel_B is not None:
            raise UserError("CoCa has no parallel mode: set parallel_fraction to 0")
        self._check_length(tokens_BL.shape[1])
        decoder = self.module(params).decoder
        return decoder.hidden(decoder.text(tokens_BL), memory_BQD)

    def logits(self, params: Params, hidden_BLE: Float[Array, "B L E"]) -> Float[Array, "B L V"]:
        """Float32 logits of the padded vocabulary; padded columns hold the least float32."""
        return self.module(params).decoder.head(hidden_BLE)

    def output_head(self, params: Params) -> tuple[Float[Array, "E V"], Float[Array, " V"]]:
        """Float32 kernel and bias behind `logits`, as stored: split over `fsdp` and `tensor`."""
        return self.module(params).decoder.head.parameters()

    def start_decoding(
        self,
        params: Params,
        memories: Sequence[Float[Array, "B Q D"] | None],
        *,
        batch: int,
        length: int,
        num_rows: int = 1,
    ) -> tuple[DecodeStep, tuple[LayerCache, ...]]:
        """See `Captioner.start_decoding`."""
        self._check_length(length)
        return self.module(params).decoder.start_decoding(memories, batch, length, num_rows)

    def flops_per_example(self) -> float:
        """Matmul FLOPs (2mnk) of an image and a text, the backward pass counted as twice forward.

        Attention is counted in full, embedding look-ups and the comparisons of the contrastive loss
        as nothing, recomputation not at all.
        """
        c = self.config
        queries, length, width = c.caption_queries, c.text_length, c.decoder_width
        image = encoder_flops(c) + pooler_flops(queries, c.memory_length, c.width)
        image += pooler_flops(1, queries, c.width) + 2 * c.width * c.embedding_dim
        multimodal_depth = c.decoder_depth - c.unimodal_depth
        text = stack_flops(length + 1, width, c.unimodal_depth, c.decoder_mlp_dim)
        text += stack_flops(length, width, multimodal_depth, c.decoder_mlp_dim)
        cross = 2 * length * width * (2 * width + 2 * queries) + 2 * queries * 2 * c.width * width
        text += multimodal_depth * cross
        text += 2 * length * width * c.vocab_size + 2 * width * c.embedding_dim
        return 3.0 * (image + text)

    def _check_length(self, length: int) -> None:
        if length > self.config.text_length:
            raise UserError(f"{length} tokens, but text_length={self.config.text_length}")
