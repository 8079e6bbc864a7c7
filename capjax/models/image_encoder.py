"""The image encoder: a ViT whose output is its whole sequence.

The sequence is the patches, the class token if there is one, the registers: attention does not
mind the order, and the patches are always the first `num_patches`.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from capjax.dims import Array, Float, UInt8
from capjax.errors import UserError
from capjax.mesh import BATCH, act_BLD, embedding_LD, kernel_HWCD, out_sharding
from capjax.models.attention import SelfAttention
from capjax.models.layers import ACTIVATIONS, LayerNorm, Mlp, Projection
from capjax.models.parameters import (
    broadcast,
    lecun_normal,
    normal,
    parameter,
    use,
    xavier_uniform,
)
from capjax.models.stack import REMAT_POLICIES, run_stack, stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """Sizes and numerics of an image encoder, and of whatever stands on it.

    Attributes:
      image_size: height and width of the images, in pixels; a multiple of `patch_size`.
      mlp_dim: hidden units of each MLP.
      posemb: "learn", or "sincos2d" for fixed positions.
      pool: one feature from the sequence: "gap" is the mean of the patches, "tok" a class token,
        "map" attention with a learned query (it needs a model that has that head).
      num_registers: learned tokens beside the patches, for the encoder's own use (Darcet et al.
        2024, "Vision Transformers Need Registers"); a decoder sees them too.
      qk_norm: LayerNorm of queries and keys.
      activation: of the MLPs, one of `layers.ACTIVATIONS`.
      norm_eps: added to the variance in every LayerNorm.
      pre_norm: a LayerNorm before the first block, as in CLIP.
      image_mean: of pixels in [0, 1], by channel; uint8 images are normalised with these two.
      image_std: likewise.
      dtype: "float32" or "bfloat16" for the computation; parameters are always float32.
      remat: what the backward pass recomputes: "none", "dots" or "full" (see `run_stack`).
      scan: one compiled block under `lax.scan`; False unrolls: slower to compile, faster to run (on
        a GPU by a fifth).
      attention: which implementation of attention (see `attention.attend`).
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    posemb: str = "learn"
    pool: str = "gap"
    num_registers: int = 0
    qk_norm: bool = False
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    pre_norm: bool = False
    image_mean: Sequence[float] = (0.5, 0.5, 0.5)
    image_std: Sequence[float] = (0.5, 0.5, 0.5)
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True
    attention: str = "auto"

    def __post_init__(self):
        self.check_choice("posemb", ("learn", "sincos2d"))
        self.check_choice("pool", ("gap", "tok", "map"))
        self.check_choice("activation", tuple(ACTIVATIONS))
        self.check_choice("dtype", ("float32", "bfloat16"))
        self.check_choice("remat", REMAT_POLICIES)
        self.check_choice("attention", ("auto", "xla", "cudnn", "pallas"))
        self.check_at_least_one(
            "image_size", "patch_size", "width", "depth", "num_heads", "mlp_dim"
        )
        if self.image_size % self.patch_size:
            raise UserError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )
        if self.num_registers < 0:
            raise UserError(f"num_registers={self.num_registers}: expected 0 or more")
        if not self.norm_eps > 0:
            raise UserError(f"norm_eps={self.norm_eps}: expected a number above 0, such as 1e-6")
        self._check_channels()
        self.check_heads("")

    def _check_channels(self) -> None:
        for name in ("image_mean", "image_std"):
            value = tuple(map(float, getattr(self, name)))  # JSON has lists for tuples
            object.__setattr__(self, name, value)
            if len(value) != 3:
                raise UserError(f"{name}={value}: expected one number a channel, three of them")
        if min(self.image_std) <= 0:
            raise UserError(f"image_std={self.image_std}: expected one number above 0 a channel")

    def check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        """Raises `UserError` unless the field holds one of `choices`."""
        if getattr(self, name) not in choices:
            raise UserError(f"{name}={getattr(self, name)!r}: choose one of {choices}")

    def check_at_least_one(self, *names: str) -> None:
        """Raises `UserError` unless each field is 1 or more."""
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected 1 or more")

    def check_heads(self, prefix: str, posemb: str | None = None) -> None:
        """Raises `UserError` unless heads and positions of the tower `prefix` fit its width.

        Its `posemb` is this configuration's unless given.
        """
        width, heads = getattr(self, f"{prefix}width"), getattr(self, f"{prefix}num_heads")
        if width % heads:
            raise UserError(f"{prefix}width={width} is not a multiple of {prefix}num_heads={heads}")
        if (posemb or self.posemb) == "sincos2d" and (width % 4 or width < 8):
            raise UserError(f"{prefix}width={width}: sincos2d needs a multiple of 4 from 8 up")

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def memory_length(self) -> int:
        """Length of the encoder's output: patches, class token, registers."""
        return self.num_patches + (self.pool == "tok") + self.num_registers


def normalize(
    images_BHWC: UInt8[Array, "B H W C"] | Float[Array, "B H W C"], config: ImageEncoderConfig
) -> Float[Array, "B H W C"]:
    """Images in the compute type. Raises `UserError` where they have another size.

    Of uint8 the configuration's mean and deviation become 0 and 1 (as they are by default, 0 and
    255 become -1 and 1). Floats are taken as normalised.
    """
    size = config.image_size
    if images_BHWC.shape[1:] != (size, size, 3):
        raise UserError(f"images of shape {images_BHWC.shape}: expected (batch, {size}, {size}, 3)")
    if images_BHWC.dtype == jnp.uint8:
        # In this form a mean and a deviation of 0.5 are x / 127.5 - 1 to the bit.
        mean_C, std_C = (np.asarray(x, np.float32) for x in (config.image_mean, config.image_std))
        images_BHWC = images_BHWC.astype(jnp.float32) / (255 * std_C)[None, None, None]
        images_BHWC -= (mean_C / std_C)[None, None, None]
    return images_BHWC.astype(config.dtype)


def sincos2d(height: int, width: int, features: int) -> np.ndarray:
    """Fixed position embeddings (height * width, features) of a grid, row by row.

    Sine and cosine of the column, then of the row, at features/4 frequencies from 1 to 1/10000
    (MoCo v3; big_vision's `posemb_sincos_2d`).
    """
    rows, columns = np.mgrid[:height, :width].reshape(2, -1, 1)
    frequencies = 10_000.0 ** -(np.arange(features // 4) / (features // 4 - 1))
    return np.concatenate(
        [f(x * frequencies) for x in (columns, rows) for f in (np.sin, np.cos)], axis=1
    ).astype(np.float32)


class EncoderBlock(nnx.Module):
    """Pre-norm self-attention and MLP, with biases everywhere; numerics are the configuration's."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, config: ImageEncoderConfig):
        self.attention_norm = LayerNorm(width, eps=config.norm_eps)
        self.attention = SelfAttention(
            width,
            num_heads,
            xavier_uniform,
            use_bias=True,
            qk_norm=config.qk_norm,
            implementation=config.attention,
            norm_eps=config.norm_eps,
        )
        self.mlp_norm = LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, mlp_dim, use_bias=True, activation=config.activation)

    def __call__(
        self, x_BPD: Float[Array, "B P D"], *, is_causal: bool = False
    ) -> Float[Array, "B P D"]:
        x_BPD = x_BPD + self.attention(self.attention_norm(x_BPD), is_causal=is_causal)
        return x_BPD + self.mlp(self.mlp_norm(x_BPD))


class ImageEncoder(nnx.Module):
    """Normalised images (B, H, W, 3) to the sequence (B, P, D): patches, class token, registers."""

    def __init__(self, config: ImageEncoderConfig):
        width = config.width
        shape = (config.patch_size, config.patch_size, 3)
        law = lecun_normal(math.prod(shape), width)
        self.patch_embedding = Projection(shape, (width,), kernel_HWCD, law, use_bias=True)
        self.grid = config.image_size // config.patch_size
        self.position_embedding = (
            parameter(normal(width**-0.5), (self.grid**2, width), embedding_LD)
            if config.posemb == "learn"
            else None
        )
        # N(0, 1/sqrt(D)), as OpenAI's CLIP draws its class embedding. They have no positions.
        self.class_token = _tokens(1, width) if config.pool == "tok" else None
        self.registers = _tokens(config.num_registers, width) if config.num_registers else None
        self.pre_norm = LayerNorm(width, eps=config.norm_eps) if config.pre_norm else None
        self.blocks = stack(
            EncoderBlock(width, config.num_heads, config.mlp_dim, config), config.depth
        )
        self.norm = LayerNorm(width, eps=config.norm_eps)
        self.scan = config.scan
        self.remat = config.remat

    def embed_patches(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B P D"]:
        """The patches, each through one matmul (as a convolution of stride `patch_size` would)."""
        batch, height, _, channels = images_BHWC.shape
        size = height // self.grid
        pieces = images_BHWC.reshape(
            (batch, self.grid, size, self.grid, size, channels), out_sharding=out_sharding(P(BATCH))
        )
        pieces = pieces.transpose(0, 1, 3, 2, 4, 5).reshape(
            (batch, self.grid**2, size, size, channels), out_sharding=out_sharding(P(BATCH))
        )
        return self.patch_embedding(pieces)

    def add_positions(self, patches_BPD: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        """The patches with their place in the grid."""
        if self.position_embedding is not None:
            positions_PD = use(self.position_embedding, patches_BPD.dtype)
        else:
            positions_PD = jnp.asarray(
                sincos2d(self.grid, self.grid, patches_BPD.shape[-1]), patches_BPD.dtype
            )
        return patches_BPD + broadcast(positions_PD[None], patches_BPD.shape, act_BLD)

    def add_tokens(self, patches_BPD: Float[Array, "B P D"]) -> Float[Array, "B S D"]:
        """The patches, and after them the class token and the registers."""
        parts = [patches_BPD]
        for tokens in (self.class_token, self.registers):
            if tokens is not None:
                shape = (patches_BPD.shape[0], *tokens.shape)
                tokens_1TD = use(tokens, patches_BPD.dtype)[None]
                parts.append(broadcast(tokens_1TD, shape, act_BLD))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    def __call__(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B S D"]:
        x_BSD = self.add_tokens(self.add_positions(self.embed_patches(images_BHWC)))
        if self.pre_norm is not None:
            x_BSD = self.pre_norm(x_BSD)
        x_BSD = run_stack(
            lambda x_BSD, block: block(x_BSD),
            x_BSD,
            self.blocks,
            scan=self.scan,
            remat=self.remat,
        )
        return self.norm(x_BSD)


def _tokens(number: int, width: int) -> nnx.Param:
    return parameter(normal(width**-0.5), (number, width), embedding_LD)


def encoder_flops(config: ImageEncoderConfig) -> float:
    """Matmul FLOPs (2mnk) of the image encoder for one image, forward."""
    c = config
    patches = 2 * c.num_patches * 3 * c.patch_size**2 * c.width
    return float(patches + stack_flops(c.memory_length, c.width, c.depth, c.mlp_dim))


def stack_flops(length: int, width: int, depth: int, mlp_dim: int) -> float:
    """Matmul FLOPs (2mnk) of `depth` encoder blocks for one sequence, forward."""
    return float(depth * 2 * length * width * (4 * width + 2 * mlp_dim + 2 * length))
