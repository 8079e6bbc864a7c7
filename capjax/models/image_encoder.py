"""The image encoder: a plain ViT without class token; its output is the whole patch sequence."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from capjax.dims import Array, Float, UInt8
from capjax.errors import UserError
from capjax.mesh import BATCH, embedding_LD, kernel_HWCD, out_sharding
from capjax.models.attention import SelfAttention
from capjax.models.layers import LayerNorm, Mlp, Projection
from capjax.models.parameters import lecun_normal, normal, parameter, use, xavier_uniform
from capjax.models.stack import REMAT_POLICIES, run_stack, stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """Sizes and numerics of an image encoder, and of whatever stands on it.

    Attributes:
      image_size: height and width of the images, in pixels; a multiple of `patch_size`.
      mlp_dim: hidden units of each MLP.
      posemb: "learn", or "sincos2d" for fixed positions (of image and text).
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
    posemb: str = "learn"
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True

    def __post_init__(self):
        self.check_choice("posemb", ("learn", "sincos2d"))
        self.check_choice("dtype", ("float32", "bfloat16"))
        self.check_choice("remat", REMAT_POLICIES)
        self.check_at_least_one(
            "image_size", "patch_size", "width", "depth", "num_heads", "mlp_dim"
        )
        if self.image_size % self.patch_size:
            raise UserError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )
        self.check_heads("")

    def check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        """Raises `UserError` unless the field holds one of `choices`."""
        if getattr(self, name) not in choices:
            raise UserError(f"{name}={getattr(self, name)!r}: choose one of {choices}")

    def check_at_least_one(self, *names: str) -> None:
        """Raises `UserError` unless each field is 1 or more."""
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected 1 or more")

    def check_heads(self, prefix: str) -> None:
        """Raises `UserError` unless the heads of the tower `prefix` divide its width."""
        width, heads = getattr(self, f"{prefix}width"), getattr(self, f"{prefix}num_heads")
        if width % heads:
            raise UserError(f"{prefix}width={width} is not a multiple of {prefix}num_heads={heads}")
        if self.posemb == "sincos2d" and (width % 4 or width < 8):
            raise UserError(f"{prefix}width={width}: sincos2d needs a multiple of 4 from 8 up")

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


def normalize(
    images_BHWC: UInt8[Array, "B H W C"] | Float[Array, "B H W C"], config: ImageEncoderConfig
) -> Float[Array, "B H W C"]:
    """Images in the compute type; uint8 becomes x / 127.5 - 1. Raises `UserError` for the size."""
    size = config.image_size
    if images_BHWC.shape[1:] != (size, size, 3):
        raise UserError(f"images of shape {images_BHWC.shape}: expected (batch, {size}, {size}, 3)")
    if images_BHWC.dtype == jnp.uint8:
        images_BHWC = images_BHWC.astype(jnp.float32) / 127.5 - 1
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
    """Pre-norm self-attention and MLP."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int):
        self.attention_norm = LayerNorm(width)
        self.attention = SelfAttention(width, num_heads, xavier_uniform, use_bias=True)
        self.mlp_norm = LayerNorm(width)
        self.mlp = Mlp(width, mlp_dim, use_bias=True)

    def __call__(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        x_BPD = x_BPD + self.attention(self.attention_norm(x_BPD))
        return x_BPD + self.mlp(self.mlp_norm(x_BPD))


class ImageEncoder(nnx.Module):
    """Images (B, H, W, 3) in [-1, 1] to patches (B, P, D)."""

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
        block = EncoderBlock(width, config.num_heads, config.mlp_dim)
        self.blocks = stack(block, config.depth)
        self.norm = LayerNorm(width)
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
        return patches_BPD + positions_PD[None]

    def __call__(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B P D"]:
        patches_BPD = self.add_positions(self.embed_patches(images_BHWC))
        patches_BPD = run_stack(
            lambda x_BPD, block: block(x_BPD),
            patches_BPD,
            self.blocks,
            scan=self.scan,
            remat=self.remat,
        )
        return self.norm(patches_BPD)
