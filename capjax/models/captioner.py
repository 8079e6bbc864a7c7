"""The captioner: an image encoder and a text decoder behind pure functions of a dict of arrays.

The model is CapPa (Tschannen et al. 2023), with the parameters and the numerics of big_vision's
`models/proj/cappa/cappa.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from capjax.dims import Array, Bool, Float, Int, Params, PRNGKeyArray, UInt8
from capjax.errors import UserError
from capjax.mesh import check_divides
from capjax.models import functional
from capjax.models.image_encoder import ImageEncoder
from capjax.models.stack import REMAT_POLICIES
from capjax.models.text_decoder import DecoderCache, TextDecoder, pad_to_lanes


@dataclasses.dataclass(frozen=True)
class CaptionerConfig:
    """Sizes and numerics of a captioner.

    Attributes:
      image_size: height and width of the images, in pixels; a multiple of `patch_size`.
      mlp_dim: hidden units of each MLP.
      posemb: "learn", or "sincos2d" for fixed positions (of image and text).
      decoder_width: like the three fields after it, 0 means "as the encoder's".
      decoder_bias: biases in the decoder's MLPs and LayerNorms (its attention never has any).
      vocab_size: tokens that can be predicted. The mask token's id is `vocab_size`.
      text_length: tokens of a caption, its end included.
      mask_token: whether the embedding has a row for the mask token (needed for parallel mode).
      dtype: "float32" or "bfloat16" for the computation; parameters are always float32.
      remat: what the backward pass recomputes: "none", "dots" or "full" (see `run_stack`).
      scan: one compiled block under `lax.scan`; False unrolls: slower to compile, faster to run.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    vocab_size: int
    posemb: str = "learn"
    decoder_width: int = 0
    decoder_depth: int = 0
    decoder_num_heads: int = 0
    decoder_mlp_dim: int = 0
    decoder_bias: bool = False
    text_length: int = 64
    mask_token: bool = True
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True

    def __post_init__(self):
        for name, choices in {
            "posemb": ("learn", "sincos2d"),
            "dtype": ("float32", "bfloat16"),
            "remat": REMAT_POLICIES,
        }.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r}: choose one of {choices}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name.startswith("decoder_") else 1
            if type(value) is int and value < least:
                raise UserError(f"{field.name}={value}: expected {least} or more")
        if self.image_size % self.patch_size:
            raise UserError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )
        for kind, width, heads in (
            ("", self.width, self.num_heads),
            ("decoder_", self.text_width, self.text_num_heads),
        ):
            if width % heads:
                raise UserError(f"{kind}width={width} is not a multiple of {kind}num_heads={heads}")
            if self.posemb == "sincos2d" and (width % 4 or width < 8):
                raise UserError(f"{kind}width={width}: sincos2d needs a multiple of 4 from 8 up")

    @property
    def text_width(self) -> int:
        """Width of the decoder."""
        return self.decoder_width or self.width

    @property
    def text_depth(self) -> int:
        """Blocks in the decoder."""
        return self.decoder_depth or self.depth

    @property
    def text_num_heads(self) -> int:
        """Heads in the decoder."""
        return self.decoder_num_heads or self.num_heads

    @property
    def text_mlp_dim(self) -> int:
        """Hidden units of the decoder's MLPs."""
        return self.decoder_mlp_dim or self.mlp_dim

    @property
    def num_patches(self) -> int:
        """Length of the encoder's sequence."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_embeddings(self) -> int:
        """Rows in use of the token embedding."""
        return self.vocab_size + self.mask_token


class CaptionerModule(nnx.Module):
    """Encoder and decoder; used through `Captioner`."""

    def __init__(self, config: CaptionerConfig):
        shared = {"posemb": config.posemb, "scan": config.scan, "remat": config.remat}
        self.encoder = ImageEncoder(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_dim=config.mlp_dim,
            **shared,
        )
        self.decoder = TextDecoder(
            num_tokens=config.vocab_size,
            num_embeddings=config.num_embeddings,
            text_length=config.text_length,
            memory_width=config.width,
            width=config.text_width,
            depth=config.text_depth,
            num_heads=config.text_num_heads,
            mlp_dim=config.text_mlp_dim,
            use_bias=config.decoder_bias,
            **shared,
        )


@dataclasses.dataclass(frozen=True)
class Captioner:
    """A captioner of one configuration. Methods are pure functions of `params`, a nested dict."""

    config: CaptionerConfig

    @property
    def mask_id(self) -> int:
        """The mask token: the decoder's input at every position in parallel mode."""
        return self.config.vocab_size

    @functools.partial(jax.jit, static_argnums=0)
    def _init(self, key):
        return functional.init(_builder(self.config), key)

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters, laid out on the mesh if one is set (the same numbers on any mesh).

        Raises `UserError` where a size does not divide over its mesh axis.
        """
        check_divides(self.abstract_params(), self.param_specs())
        return self._init(key)

    def abstract_params(self) -> Params:
        """Shape and type of every parameter."""
        return functional.abstract_params(_builder(self.config))

    def param_specs(self) -> Params:
        """The `PartitionSpec` of every parameter."""
        return functional.param_specs(_builder(self.config))

    def num_params(self) -> int:
        """Parameters, without the padding of the vocabulary."""
        sizes = jax.tree.map(lambda x: x.size, self.abstract_params())
        embeddings, columns = self.config.num_embeddings, self.config.vocab_size
        padding = (pad_to_lanes(embeddings) - embeddings) * self.config.text_width
        padding += (pad_to_lanes(columns) - columns) * (self.config.text_width + 1)
        return sum(jax.tree.leaves(sizes)) - padding

    def encode(
        self, params: Params, images_BHWC: UInt8[Array, "B H W C"] | Float[Array, "B H W C"]
    ) -> Float[Array, "B P D"]:
        """Patches after the encoder's final LayerNorm. Images are uint8, or floats in [-1, 1]."""
        size = self.config.image_size
        if images_BHWC.shape[1:] != (size, size, 3):
            raise UserError(
                f"images of shape {images_BHWC.shape}: expected (batch, {size}, {size}, 3)"
            )
        return self._module(params).encoder(self.normalize(images_BHWC))

    def normalize(self, images_BHWC: Array) -> Float[Array, "B H W C"]:
        """Images in the compute type; uint8 becomes x / 127.5 - 1."""
        if images_BHWC.dtype == jnp.uint8:
            images_BHWC = images_BHWC.astype(jnp.float32) / 127.5 - 1
        return images_BHWC.astype(self.config.dtype)

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
        return self._module(params).decoder.hidden(tokens_BL, patches_BPD, is_parallel_B)

    def logits(self, params: Params, hidden_BLE: Float[Array, "B L E"]) -> Float[Array, "B L V"]:
        """Float32 logits of the padded vocabulary; padded columns hold the least float32."""
        return self._module(params).decoder.head(hidden_BLE)

    def output_head(self, params: Params) -> tuple[Float[Array, "E V"], Float[Array, " V"]]:
        """Float32 kernel and bias behind `logits`, gathered over `fsdp`, split over `tensor`."""
        return self._module(params).decoder.head.parameters()

    def start_cache(
        self, params: Params, patches_BPD: Float[Array, "B P D"], length: int
    ) -> DecoderCache:
        """A cache for up to `length` tokens; keys and values of the patches are computed here."""
        self._check_length(length)
        return self._module(params).decoder.start_cache(patches_BPD, length)

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
        return self._module(params).decoder.decode_step(tokens_B, jnp.asarray(index), cache)

    def flops_per_example(self) -> float:
        """Matmul FLOPs (2mnk) of one training example, the backward pass counted as twice forward.

        Attention is counted in full, embedding look-ups as nothing, recomputation not at all.
        """
        c = self.config
        patches, length, width, text_width = c.num_patches, c.text_length, c.width, c.text_width
        encoder = 2 * patches * 3 * c.patch_size**2 * width
        encoder += c.depth * 2 * patches * width * (4 * width + 2 * c.mlp_dim + 2 * patches)
        per_token = 6 * text_width + 2 * c.text_mlp_dim + 2 * length + 2 * patches
        decoder = c.text_depth * 2 * length * text_width * per_token
        decoder += c.text_depth * 2 * patches * 2 * width * text_width
        head = 2 * length * text_width * c.vocab_size
        return 3.0 * (encoder + decoder + head)

    def _check_length(self, length: int) -> None:
        if length > self.config.text_length:
            raise UserError(f"{length} tokens, but text_length={self.config.text_length}")

    def _module(self, params: Params) -> Any:
        return functional.merge(_builder(self.config), params)


@functools.lru_cache(maxsize=64)
def _builder(config: CaptionerConfig) -> functional.Build:
    """A builder without arguments, the same object for the same configuration (it keys a cache)."""
    return functools.partial(CaptionerModule, config)
