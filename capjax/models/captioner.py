"""The captioner: an image encoder and a text decoder behind pure functions of a dict of arrays.

By default the model is CapPa (Tschannen et al. 2023), with the parameters and the numerics of
big_vision's `models/proj/cappa/cappa.py`.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Bool, Float, Int, Params, UInt8
from capjax.errors import UserError
from capjax.models.cache import LayerCache
from capjax.models.functional import PureModel
from capjax.models.image_encoder import (
    ImageEncoder,
    ImageEncoderConfig,
    encoder_flops,
    normalize,
)
from capjax.models.pooling import pool
from capjax.models.text_decoder import DecodeStep, TextDecoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionerConfig(ImageEncoderConfig):
    """Sizes and numerics of a captioner, beside those of its image encoder.

    Attributes:
      decoder_width: like the three fields after it, 0 stands for the encoder's and becomes it.
      decoder_bias: biases in the decoder's MLPs and LayerNorms (its attention never has any).
      decoder_posemb: positions of the text: "learn", "sincos2d", "rotary", or "" for `posemb`.
      decoder_qk_norm: LayerNorm of queries and keys in the decoder.
      vocab_size: tokens that can be predicted. The mask token's id is `vocab_size`.
      text_length: tokens of a caption, its end included.
      mask_token: whether the embedding has a row for the mask token (needed for parallel mode).
      mask_padding: in causal rows padding is not attended to, as in clip-jax; big_vision attends to
        it. Padding stands last, so this changes the states at padding alone, and no loss; a fused
        kernel is then not taken.
      null_memory: what stands for the image where it is dropped: "zeros", or one "learned" vector.
    """

    vocab_size: int
    decoder_width: int = 0
    decoder_depth: int = 0
    decoder_num_heads: int = 0
    decoder_mlp_dim: int = 0
    decoder_bias: bool = False
    decoder_posemb: str = ""
    decoder_qk_norm: bool = False
    text_length: int = 64
    mask_token: bool = True
    mask_padding: bool = False
    null_memory: str = "zeros"

    def __post_init__(self):
        super().__post_init__()
        for name in ("width", "depth", "num_heads", "mlp_dim"):
            if not getattr(self, f"decoder_{name}"):
                object.__setattr__(self, f"decoder_{name}", getattr(self, name))
        self.check_at_least_one(
            *("vocab_size", "text_length"),
            *("decoder_width", "decoder_depth", "decoder_num_heads", "decoder_mlp_dim"),
        )
        self.check_choice("decoder_posemb", ("", "learn", "sincos2d", "rotary"))
        self.check_choice("null_memory", ("zeros", "learned"))
        self.check_heads("decoder_", self.text_posemb)
        if self.text_posemb == "rotary" and self.decoder_width // self.decoder_num_heads % 2:
            raise UserError(
                f"decoder_width={self.decoder_width} over decoder_num_heads="
                f"{self.decoder_num_heads}: rotary positions need heads of an even width"
            )

    @property
    def text_posemb(self) -> str:
        """The decoder's positions."""
        return self.decoder_posemb or self.posemb

    @property
    def num_embeddings(self) -> int:
        """Rows in use of the token embedding."""
        return self.vocab_size + self.mask_token


class CaptionerModule(nnx.Module):
    """Encoder and decoder; used through `Captioner`."""

    def __init__(self, config: CaptionerConfig):
        self.encoder = ImageEncoder(config)
        self.decoder = TextDecoder(
            num_tokens=config.vocab_size,
            num_embeddings=config.num_embeddings,
            text_length=config.text_length,
            memory_width=config.width,
            width=config.decoder_width,
            depth=config.decoder_depth,
            num_heads=config.decoder_num_heads,
            mlp_dim=config.decoder_mlp_dim,
            use_bias=config.decoder_bias,
            posemb=config.text_posemb,
            qk_norm=config.decoder_qk_norm,
            activation=config.activation,
            norm_eps=config.norm_eps,
            learned_null=config.null_memory == "learned",
            attention=config.attention,
            scan=config.scan,
            remat=config.remat,
        )


@dataclasses.dataclass(frozen=True)
class Captioner(PureModel):
    """A captioner of one configuration. Methods are pure functions of `params`, a nested dict."""

    config: CaptionerConfig
    module_class: ClassVar[type] = CaptionerModule

    @property
    def mask_id(self) -> int:
        """The mask token: the decoder's input at every position in parallel mode."""
        return self.config.vocab_size

    def encode(
        self, params: Params, images_BHWC: UInt8[Array, "B H W C"] | Float[Array, "B H W C"]
    ) -> Float[Array, "B P D"]:
        """The memory: the encoder's whole sequence. Images are uint8, or floats normalised."""
        return self.module(params).encoder(normalize(images_BHWC, self.config))

    def pooled(self, params: Params, memory_BPD: Float[Array, "B P D"]) -> Float[Array, "B D"]:
        """One feature an image, by `pool`. Raises `UserError` for "map", whose head it lacks."""
        del params
        return pool(memory_BPD, self.config)

    def drop_memory(
        self,
        params: Params,
        memory_BPD: Float[Array, "B P D"],
        is_dropped_B: Bool[Array, " B"],
    ) -> Float[Array, "B P D"]:
        """The memory, in dropped rows replaced by what stands for no image (`null_memory`)."""
        return self.module(params).decoder.drop_memory(memory_BPD, is_dropped_B)

    def hidden(
        self,
        params: Params,
        tokens_BL: Int[Array, "B L"],
        memory_BPD: Float[Array, "B P D"],
        is_parallel_B: Bool[Array, " B"] | Literal[True] | None = None,
    ) -> Float[Array, "B L E"]:
        """The decoder's states after its final LayerNorm.

        Args:
          tokens_BL: decoder inputs: labels shifted right behind a 0, or `mask_id` everywhere. With
            `mask_padding` the zeros after the first are the padding.
          is_parallel_B: examples whose positions all see each other; None: all are causal; True:
            all are parallel, which spares the mask.
        """
        length = tokens_BL.shape[1]
        self._check_length(length)
        is_padding_BL = None
        if self.config.mask_padding:
            is_padding_BL = (tokens_BL == PAD_ID) & (jnp.arange(length) > 0)[None]
        decoder = self.module(params).decoder
        return decoder.hidden(tokens_BL, memory_BPD, is_parallel_B, is_padding_BL)

    def parallel_hidden(
        self, params: Params, memory_BPD: Float[Array, "B P D"], length: int
    ) -> Float[Array, "B L E"]:
        """`hidden` of `mask_id` at every position of rows that are all parallel, for less work.

        Raises `UserError` where the model has no mask token.
        """
        self._check_length(length)
        if not self.config.mask_token:
            raise UserError("mask_token=False: parallel mode reads mask tokens; set it to True")
        return self.module(params).decoder.parallel_hidden(memory_BPD, length)

    def logits(self, params: Params, hidden_BLE: Float[Array, "B L E"]) -> Float[Array, "B L V"]:
        """Float32 logits of the padded vocabulary; padded columns hold the least float32."""
        return self.module(params).decoder.head(hidden_BLE)

    def output_head(self, params: Params) -> tuple[Float[Array, "E V"], Float[Array, " V"]]:
        """Float32 kernel and bias behind `logits`, as stored: split over `fsdp` and `tensor`."""
        return self.module(params).decoder.head.parameters()

    def start_decoding(
        self,
        params: Params,
        memories: Sequence[Float[Array, "B P D"] | None],
        *,
        batch: int,
        length: int,
        num_rows: int = 1,
    ) -> tuple[DecodeStep, tuple[LayerCache, ...]]:
        """(step, cache) to write `num_rows` texts an image, token by token.

        `step(tokens_BS, index, cache, ancestors_BSL=None)` takes the decoder inputs of position
        `index` (in order from 0; the first input is 0) and gives logits [B, R, V], states after the
        final LayerNorm [B, R, E], and the cache with the position written in. It fits into
        `lax.while_loop`. Parameters are cast, and memories projected, here, once.

        Args:
          memories: what each group of rows sees: the memory of its image, or None for no image
            (`null_memory`). Every group is fed the same tokens, and R = num_rows * len(memories).
          ancestors_BSL: in which of its group's rows position l of row s lies, where texts go on
            from one another's, as beams do. Default: in its own.
        """
        self._check_length(length)
        decoder = self.module(params).decoder
        return decoder.start_decoding(memories, batch, length, num_rows, self.config.dtype)

    def flops_per_example(self) -> float:
        """Matmul FLOPs (2mnk) of one training example, the backward pass counted as twice forward.

        Attention is counted in full, embedding look-ups as nothing, recomputation not at all.
        """
        c = self.config
        seen, length, width, text_width = c.memory_length, c.text_length, c.width, c.decoder_width
        per_token = 6 * text_width + 2 * c.decoder_mlp_dim + 2 * length + 2 * seen
        decoder = c.decoder_depth * 2 * length * text_width * per_token
        decoder += c.decoder_depth * 2 * seen * 2 * width * text_width
        head = 2 * length * text_width * c.vocab_size
        return 3.0 * (encoder_flops(c) + decoder + head)

    def _check_length(self, length: int) -> None:
        if length > self.config.text_length:
            raise UserError(f"{length} tokens, but text_length={self.config.text_length}")
