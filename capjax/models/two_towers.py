"""Two towers: an image encoder and a text encoder into one space, for contrastive objectives.

With attention pooling, a bidirectional text encoder and a logit bias it is SigLIP (Zhai et al.
2023; big_vision's `models/proj/image_text/two_towers.py`); with a class token, `pre_norm`, a causal
text encoder and `text_pool="eos"` it is CLIP (Radford et al. 2021).
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from capjax.dims import Array, Float, Int, Params, UInt8
from capjax.errors import UserError
from capjax.models.functional import PureModel
from capjax.models.image_encoder import (
    ImageEncoder,
    ImageEncoderConfig,
    encoder_flops,
    normalize,
    stack_flops,
)
from capjax.models.parameters import Law, parameter
from capjax.models.pooling import MapHead, map_flops, pool, unit_norm
from capjax.models.text_encoder import TextEncoder, apply_projection, project_feature


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTowersConfig(ImageEncoderConfig):
    """Sizes and numerics of two towers, beside those of the image encoder.

    The text encoder has the image encoder's activation, eps, QK-norm and type; its positions are
    always learned.

    Attributes:
      text_length: tokens of a text, its end included.
      text_width: like the three fields after it, 0 stands for the image encoder's and becomes it.
      text_causal: whether a token sees only the ones before it.
      text_pool: the token that stands for the text: the "last", or "eos": the first `eos_id`.
      text_pad_id: the token that the text encoder reads for padding (0).
      embedding_dim: of the common space. 0: the image encoder's width without an image projection,
        the text encoder's with one.
      image_projection: whether the image's feature is projected, as the text's always is.
      text_projection_bias: a bias in the text's projection, and in the image's if there is one.
      logit_scale_init: initial logarithm of the logits' scale.
      logit_bias_init: initial logit bias; None: there is none.
    """

    vocab_size: int
    text_length: int = 64
    text_width: int = 0
    text_depth: int = 0
    text_num_heads: int = 0
    text_mlp_dim: int = 0
    text_causal: bool = False
    text_pool: str = "last"
    eos_id: int = 1
    text_pad_id: int = 1
    embedding_dim: int = 0
    image_projection: bool = False
    text_projection_bias: bool = True
    logit_scale_init: float = math.log(10)
    logit_bias_init: float | None = -10.0

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("text_pool", ("last", "eos"))
        for name in ("width", "depth", "num_heads", "mlp_dim"):
            if not getattr(self, f"text_{name}"):
                object.__setattr__(self, f"text_{name}", getattr(self, name))
        if not self.embedding_dim:
            default = self.text_width if self.image_projection else self.width
            object.__setattr__(self, "embedding_dim", default)
        self.check_at_least_one(
            *("vocab_size", "text_length", "embedding_dim"),
            *("text_width", "text_depth", "text_num_heads", "text_mlp_dim"),
        )
        self.check_heads("text_", "learn")
        if not self.image_projection and self.embedding_dim != self.width:
            raise UserError(
                f"embedding_dim={self.embedding_dim} is not width={self.width}: "
                "set image_projection=True, or embedding_dim=0"
            )
        for name in ("eos_id", "text_pad_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise UserError(
                    f"{name}={getattr(self, name)}: expected a token, 0 to {self.vocab_size - 1}"
                )


class ImageHead(nnx.Module):
    """What stands on the image encoder: attention pooling and a projection, or neither."""

    def __init__(self, config: TwoTowersConfig):
        self.pool = MapHead(config) if config.pool == "map" else None
        self.projection = (
            project_feature(
                config.width, config.embedding_dim, use_bias=config.text_projection_bias
            )
            if config.image_projection
            else None
        )


class ContrastiveScale(nnx.Module):
    """Scale (its logarithm) and bias of the logits."""

    def __init__(self, logit_scale_init: float, logit_bias_init: float | None):
        self.logit_scale = parameter(Law("constant", logit_scale_init), ())
        self.logit_bias = (
            None if logit_bias_init is None else parameter(Law("constant", logit_bias_init), ())
        )

    def __call__(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """exp(scale), and the bias: 0 where there is none."""
        bias = jnp.zeros(()) if self.logit_bias is None else self.logit_bias[...]
        return jnp.exp(self.logit_scale[...]), bias


class TwoTowersModule(nnx.Module):
    """Both towers; used through `TwoTowers`."""

    def __init__(self, config: TwoTowersConfig):
        self.encoder = ImageEncoder(config)
        self.image_head = ImageHead(config)
        self.text_encoder = TextEncoder(
            vocab_size=config.vocab_size,
            text_length=config.text_length,
            width=config.text_width,
            depth=config.text_depth,
            num_heads=config.text_num_heads,
            mlp_dim=config.text_mlp_dim,
            causal=config.text_causal,
            pool=config.text_pool,
            eos_id=config.eos_id,
            pad_id=config.text_pad_id,
            output_width=config.embedding_dim,
            projection_bias=config.text_projection_bias,
            numerics=config,
        )
        self.contrastive = ContrastiveScale(config.logit_scale_init, config.logit_bias_init)


@dataclasses.dataclass(frozen=True)
class TwoTowers(PureModel):
    """Two towers of one configuration. Methods are pure functions of `params`, a nested dict."""

    config: TwoTowersConfig
    module_class: ClassVar[type] = TwoTowersModule
    # Patterns of the parameters that no image goes through.
    text_side: ClassVar[tuple[str, ...]] = ("text_encoder", "contrastive")

    def encode(
        self, params: Params, images_BHWC: UInt8[Array, "B H W C"] | Float[Array, "B H W C"]
    ) -> Float[Array, "B P D"]:
        """The image encoder's whole sequence. Images are uint8, or floats already normalised."""
        return self.module(params).encoder(normalize(images_BHWC, self.config))

    def pooled(self, params: Params, memory_BPD: Float[Array, "B P D"]) -> Float[Array, "B D"]:
        """The image's feature before the projection."""
        head = self.module(params).image_head.pool
        return pool(memory_BPD, self.config) if head is None else head(memory_BPD)

    def embed_image(self, params: Params, memory_BPD: Float[Array, "B P D"]) -> Float[Array, "B E"]:
        """Float32 embeddings of length 1, of what `encode` gave."""
        feature_BD = self.pooled(params, memory_BPD)
        projection = self.module(params).image_head.projection
        return unit_norm(
            feature_BD if projection is None else apply_projection(projection, feature_BD)
        )

    def embed_text(self, params: Params, tokens_TL: Int[Array, "T L"]) -> Float[Array, "T E"]:
        """Float32 embeddings of length 1; tokens are padded with 0."""
        return self.project_text(params, self.text_feature(params, tokens_TL))

    def project_text(self, params: Params, feature_TD: Float[Array, "T D"]) -> Float[Array, "T E"]:
        """Float32 embeddings of length 1, of what `text_feature` gave."""
        return unit_norm(apply_projection(self.module(params).text_encoder.projection, feature_TD))

    def text_feature(self, params: Params, tokens_TL: Int[Array, "T L"]) -> Float[Array, "T D"]:
        """The text's feature before the projection."""
        length = tokens_TL.shape[1]
        if length > self.config.text_length:
            raise UserError(f"{length} tokens, but text_length={self.config.text_length}")
        return self.module(params).text_encoder.pooled(tokens_TL)

    def logit_scale_and_bias(self, params: Params) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """By what cosines are multiplied, and what is added, to make logits of them."""
        return self.module(params).contrastive()

    def flops_per_example(self) -> float:
        """Matmul FLOPs (2mnk) of an image and a text, the backward pass counted as twice forward.

        Attention is counted in full, embedding look-ups and the comparisons of the loss as nothing,
        recomputation not at all.
        """
        c = self.config
        image = encoder_flops(c) + (map_flops(c) if c.pool == "map" else 0.0)
        image += 2 * c.width * c.embedding_dim * c.image_projection
        text = stack_flops(c.text_length, c.text_width, c.text_depth, c.text_mlp_dim)
        text += 2 * c.text_width * c.embedding_dim
        return 3.0 * (image + text)
