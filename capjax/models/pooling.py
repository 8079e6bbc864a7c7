"""One feature vector from a sequence: the mean of the patches, a class token, attention pooling."""

import jax.numpy as jnp
from flax import nnx

from capjax.dims import Array, Float
from capjax.errors import UserError
from capjax.mesh import act_BLNK, embedding_LD
from capjax.models.attention import CrossAttention
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.layers import LayerNorm, Mlp
from capjax.models.parameters import broadcast, parameter, use, xavier_uniform


def pool(memory_BPD: Float[Array, "B P D"], config: ImageEncoderConfig) -> Float[Array, "B D"]:
    """The encoder's feature where that takes no parameters: pool="gap" or "tok".

    "gap" is the mean over the patches alone, "tok" the class token. Raises `UserError` for "map".
    """
    match config.pool:
        case "gap":
            patches_BPD = memory_BPD[:, : config.num_patches].astype(jnp.float32)
            return jnp.mean(patches_BPD, 1).astype(memory_BPD.dtype)
        case "tok":
            return memory_BPD[:, config.num_patches]
    raise UserError(f"pool={config.pool!r} has a head, which this model lacks: use 'gap' or 'tok'")


def unit_norm(x_BD: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """x / (|x| + 1e-8) in float32."""
    x_BD = x_BD.astype(jnp.float32)
    return x_BD / (jnp.linalg.norm(x_BD, axis=-1, keepdims=True) + 1e-8)


class MapHead(nnx.Module):
    """Attention pooling: a learned query reads the whole sequence, then an MLP with a residual.

    Source: big_vision's `models/vit.py`, `MAPHead` (Zhai et al. 2022, "Scaling Vision
    Transformers"). The query's law is that of the reference: of fan in 1.
    """

    def __init__(self, config: ImageEncoderConfig):
        width = config.width
        self.probe = parameter(xavier_uniform(1, width), (1, width), embedding_LD)
        self.attention = CrossAttention(
            width,
            width,
            config.num_heads,
            xavier_uniform,
            use_bias=True,
            implementation=config.attention,
        )
        self.norm = LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, config.mlp_dim, use_bias=True, activation=config.activation)

    def __call__(self, memory_BPD: Float[Array, "B P D"]) -> Float[Array, "B D"]:
        # The same query for every image: projected once.
        query_11NK = self.attention.project_query(use(self.probe, memory_BPD.dtype)[None])
        query_B1NK = broadcast(query_11NK, (len(memory_BPD), *query_11NK.shape[1:]), act_BLNK)
        memory = self.attention.project_memory(memory_BPD)
        x_B1D = self.attention.attend(query_B1NK, memory)
        return (x_B1D + self.mlp(self.norm(x_B1D)))[:, 0]


def map_flops(config: ImageEncoderConfig) -> float:
    """Matmul FLOPs (2mnk) of a `MapHead` for one image, forward."""
    length, width = config.memory_length, config.width
    memory = 2 * length * width * 2 * width + 4 * length * width
    return float(memory + 2 * width**2 + 4 * width * config.mlp_dim)
