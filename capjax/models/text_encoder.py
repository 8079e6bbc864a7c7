"""The text encoder of two towers: a transformer over the tokens, of which one position is kept."""

import jax
import jax.numpy as jnp
from flax import nnx

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Float, Int
from capjax.mesh import act_BD, act_BLD, embedding_LD, kernel_DF, reshard
from capjax.models.image_encoder import EncoderBlock, ImageEncoderConfig
from capjax.models.layers import Embedding, LayerNorm, Projection
from capjax.models.parameters import broadcast, lecun_normal, normal, parameter, use
from capjax.models.stack import run_stack, stack
from capjax.models.text_decoder import pad_to_lanes


class TextEncoder(nnx.Module):
    """Tokens (T, L) to features (T, D): pre-norm blocks, one position, a projection.

    Source: big_vision's `models/proj/image_text/text_transformer.py`. Its positions are learned
    whatever the image's are, and padding is not masked. With `causal` and pool="eos" it is CLIP's.

    Args:
      causal: whether a position sees only the ones before it.
      pool: the position that is kept: "last", or "eos" for the first `eos_id` (without one: last).
      pad_id: the token read in place of padding.
      output_width: of the projection.
      numerics: the configuration that activation, eps, QK-norm, remat, ... are taken from.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        text_length: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        causal: bool,
        pool: str,
        eos_id: int,
        pad_id: int,
        output_width: int,
        projection_bias: bool,
        numerics: ImageEncoderConfig,
    ):
        # Flax's default for embeddings.
        self.token_embedding = Embedding(vocab_size, pad_to_lanes(vocab_size), width, width**-0.5)
        law = normal(width**-0.5)
        self.position_embedding = parameter(law, (text_length, width), embedding_LD)
        self.blocks = stack(EncoderBlock(width, num_heads, mlp_dim, numerics), depth)
        self.norm = LayerNorm(width, eps=numerics.norm_eps)
        self.projection = project_feature(width, output_width, use_bias=projection_bias)
        self.causal, self.pool = causal, pool
        self.eos_id, self.pad_id = eos_id, pad_id
        self.dtype, self.scan, self.remat = numerics.dtype, numerics.scan, numerics.remat

    def encode(self, tokens_TL: Int[Array, "T L"]) -> Float[Array, "T L D"]:
        """All positions after the final LayerNorm."""
        x_TLD = self.token_embedding(tokens_TL, self.dtype)
        positions_1LD = use(self.position_embedding, self.dtype)[None, : tokens_TL.shape[1]]
        x_TLD += broadcast(positions_1LD, x_TLD.shape, act_BLD)
        x_TLD = run_stack(
            lambda x_TLD, block: block(x_TLD, is_causal=self.causal),
            x_TLD,
            self.blocks,
            scan=self.scan,
            remat=self.remat,
        )
        return self.norm(x_TLD)

    def pooled(self, tokens_TL: Int[Array, "T L"]) -> Float[Array, "T D"]:
        """The state at the position that stands for the text."""
        tokens_TL = jnp.where(tokens_TL == PAD_ID, self.pad_id, tokens_TL)
        x_TLD = self.encode(tokens_TL)
        if self.pool == "last":
            return x_TLD[:, -1]
        length = tokens_TL.shape[1]
        is_end_TL = (tokens_TL == self.eos_id) | (jnp.arange(length) == length - 1)[None]
        # A product with zeros and a one: its gradient is no scatter.
        weights_TL = jax.nn.one_hot(jnp.argmax(is_end_TL, -1), length, dtype=x_TLD.dtype)
        return jnp.einsum("TL,TLD->TD", weights_TL, x_TLD)

    def __call__(self, tokens_TL: Int[Array, "T L"]) -> Float[Array, "T D"]:
        return apply_projection(self.projection, self.pooled(tokens_TL))


def project_feature(width: int, output_width: int, *, use_bias: bool) -> Projection:
    """The projection of a tower's feature into the space that the towers share."""
    law = lecun_normal(width, output_width)
    return Projection((width,), (output_width,), kernel_DF, law, use_bias=use_bias)


def apply_projection(projection: Projection, x_BD: Float[Array, "B D"]) -> Float[Array, "B E"]:
    """The feature through its projection, whole on every tensor shard."""
    return reshard(projection(x_BD[:, None])[:, 0], act_BD)
