"""The image encoder: a plain ViT without class token; its output is the whole patch sequence."""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from capjax.dims import Array, Float
from capjax.mesh import BATCH, embedding_LD, kernel_HWCD, out_sharding
from capjax.models.attention import SelfAttention
from capjax.models.layers import LayerNorm, Mlp, Projection
from capjax.models.parameters import lecun_normal, normal, parameter, use, xavier_uniform
from capjax.models.stack import run_stack, stack


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

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        posemb: str,
        scan: bool,
        remat: str,
    ):
        shape = (patch_size, patch_size, 3)
        law = lecun_normal(math.prod(shape), width)
        self.patch_embedding = Projection(shape, (width,), kernel_HWCD, law, use_bias=True)
        self.grid = image_size // patch_size
        self.position_embedding = (
            parameter(normal(width**-0.5), (self.grid**2, width), embedding_LD)
            if posemb == "learn"
            else None
        )
        self.blocks = stack(EncoderBlock(width, num_heads, mlp_dim), depth)
        self.norm = LayerNorm(width)
        self.scan = scan
        self.remat = remat

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
