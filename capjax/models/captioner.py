"""The captioner: an image encoder and a text decoder behind pure functions of a dict of arrays.

The model is CapPa (Tschannen et al. 2023), with the parameters and the numerics of big_vision's
`models/proj/cappa/cappa.py`.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from capjax.dims import Array, Bool, Float, Int, Params, UInt8
from capjax.errors import UserError
from capjax.models.functional import PureModel
from capjax.models.image_encoder import ImageEncoder, ImageEncoderConfig, normalize
from capjax.models.text_decoder import DecoderCache, TextDecoder, pad_to_lanes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionerConfig(ImageEncoderConfig):
    """Sizes and numerics of a captioner, beside those of its image encoder.

    Attributes:
      decoder_width: like the three fields after it, 0 stands for the encoder's and becomes it.
      decoder_bias: biases in the decoder's MLPs and LayerNorms (its attention never has any).
      vocab_size: tokens that can be predicted. The mask token's id is `vocab_size`.
      text_length: tokens of a caption, its end included.
      mask_token: whether the embedding has a row for the mask token (needed for parallel mode).
    """

    vocab_size: int
    decoder_width: int = 0
    decoder_depth: int = 0
    decoder_num_heads: int = 0
    decoder_mlp_dim: int = 0
    decoder_bias: bool = False
    text_length: int = 64
    mask_token: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("width", "depth", "num_heads", "mlp_dim"):
            if not getattr(self, f"decoder_{name}"):
                object.__setattr__(self, f"decoder_{name}", getattr(self, name))
        self.check_at_least_one(
            "vocab_size", "text_length", "decoder_width", "decoder_depth", "decoder_num_heads"
        )
        self.check_heads("decoder_")

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
            posemb=config.posemb,
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

    def num_padding(self) -> int:
        """Entries of the parameters that only pad a vocabulary."""
        embeddings, columns = self.config.num_embeddings, self.config.vocab_size
        padding = (pad_to_lanes(embeddings) - embeddings) * self.config.decoder_width
        return padding + (pad_to_lanes(columns) - columns) * (self.config.decoder_width + 1)

    def encode(
        self, params: Params, images_BHWC: UInt8[Array, "B H W C"] | Float[Array, "B H W C"]
    ) -> Float[Array, "B P D"]:
        """Patches after the encoder's final LayerNorm. Images are uint8, or floats in [-1, 1]."""
        return self.module(params).encoder(normalize(images_BHWC, self.config))

    def hidden(
        self,
        params: Params,
        tokens_BL: Int[Array, "B L"],
        patches_BPD: Float[Array, "B P D"],
        is_parallel_B: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B L E"]:
        """The decoder's states after its final LayerNorm.

        Args:
          tokens_BL: decoder inputs: labels shifted right, or `mask_id` everywhere.
          is_parallel_B: examples whose positions all see each other; None: all are causal.
        """
        self._check_length(tokens_BL.shape[1])
        return self.module(params).decoder.hidden(tokens_BL, patches_BPD, is_parallel_B)

    def logits(self, params: Params, hidden_BLE: Float[Array, "B L E"]) -> Float[Array, "B L V"]:
        """Float32 logits of the padded vocabulary; padded columns hold the least float32."""
        return self.module(params).decoder.head(hidden_BLE)

    def output_head(self, params: Params) -> tuple[Float[Array, "E V"], Float[Array, " V"]]:
        """Float32 kernel and bias behind `logits`, gathered over `fsdp`, split over `tensor`."""
        return self.module(params).decoder.head.parameters()

    def start_cache(
        self, params: Params, patches_BPD: Float[Array, "B P D"], length: int
    ) -> DecoderCache:
        """A cache for up to `length` tokens; keys and values of the patches are computed here."""
        self._check_length(length)
        return self.module(params).decoder.start_cache(patches_BPD, length)

    def decode_step(
        self,
        params: Params,
        tokens_B: Int[Array, " B"],
        index: Int[Array, ""] | int,
        cache: DecoderCache,
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        """Logits of position `index` given its input token, and the cache with it written in.

        Positions are taken in order from 0; the first input is 0. Out comes the same tree of
        shapes and types as went in, so the cache can be carried through `lax.while_loop`.
        """
        return self.module(params).decoder.decode_step(tokens_B, jnp.asarray(index), cache)

    def flops_per_example(self) -> float:
        """Matmul FLOPs (2mnk) of one training example, the backward pass counted as twice forward.

        Attention is counted in full, embedding look-ups as nothing, recomputation not at all.
        """
        c = self.config
        patches, length, width, text_width = c.num_patches, c.text_length, c.width, c.decoder_width
        encoder = 2 * patches * 3 * c.patch_size**2 * width
        encoder += c.depth * 2 * patches * width * (4 * width + 2 * c.mlp_dim + 2 * patches)
        per_token = 6 * text_width + 2 * c.decoder_mlp_dim + 2 * length + 2 * patches
        decoder = c.decoder_depth * 2 * length * text_width * per_token
        decoder += c.decoder_depth * 2 * patches * 2 * width * text_width
        head = 2 * length * text_width * c.vocab_size
        return 3.0 * (encoder + decoder + head)

    def _check_length(self, length: int) -> None:
        if length > self.config.text_length:
            raise UserError(f"{length} tokens, but text_length={self.config.text_length}")
