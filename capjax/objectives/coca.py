"""CoCa's objective: captions by the whole decoder, contrast by its first layers, in one pass.

Source: Yu et al., "CoCa: Contrastive Captioners are Image-Text Foundation Models" (2022): the
captioning loss weighs 2, the contrastive loss, CLIP's with a learned temperature, weighs 1.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Batch, Float, Metrics, Params, PRNGKeyArray
from capjax.errors import UserError
from capjax.mesh import act_BLD, out_sharding
from capjax.models.coca import CoCa
from capjax.objectives.caption_loss import caption_loss, caption_means
from capjax.objectives.caption_rows import decoder_inputs, draw_dropped, repeat
from capjax.objectives.captioning import captioning_prepare
from capjax.objectives.metrics import masked_mean
from capjax.objectives.parallel_draw import as_rows


@dataclasses.dataclass(frozen=True)
class CoCaObjective:
    """What CoCa minimises.

    Attributes:
      weight: of this loss in the sum of objectives; 0 leaves it out.
      caption_weight: of the captioning loss within it.
      contrastive_weight: of the contrastive loss within it.
      chunked: the contrastive loss never holds the matrix of all pairs; the same value.
      max_logit_scale: the factor on the cosines is held below this; 0 does not hold it.
      image_dropout: probability that an image's captions are predicted without it; the contrastive
        loss always sees the image.
      label_smoothing: of the captioning loss, spread evenly over the ids other than the label.
      z_loss: weight of the squared log of the denominator of the captioning loss's softmax.
      normalization: "token": the mean over the tokens of the global batch; "caption": the mean over
        captions of their mean over tokens.
    """

    weight: float = 0.0
    caption_weight: float = 2.0
    contrastive_weight: float = 1.0
    chunked: bool = True
    max_logit_scale: float = 0.0
    image_dropout: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    normalization: str = "token"

    def __post_init__(self):
        for name in (
            *("weight", "caption_weight", "contrastive_weight"),
            *("z_loss", "max_logit_scale"),
        ):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"objective.coca.{name}={value}: expected 0 or more")
        if not 0 <= self.image_dropout <= 1:
            raise UserError(f"objective.coca.image_dropout={self.image_dropout}: expected 0 to 1")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"objective.coca.label_smoothing={self.label_smoothing}: expected 0 to less than 1"
            )
        if self.normalization not in ("caption", "token"):
            raise UserError(
                f"objective.coca.normalization={self.normalization!r}: choose caption or token"
            )


def coca_prepare(batch: Batch, key: PRNGKeyArray, **settings: Any) -> Batch:
    """What must be known of the whole batch before it is cut: as `captioning_prepare`."""
    normalization = CoCaObjective(**settings).normalization
    return captioning_prepare(batch, key, parallel_fraction=0.0, normalization=normalization)


def coca_rows(
    model: CoCa,
    params: Params,
    memory_BQD: Float[Array, "B Q D"],
    batch: Batch,
    key: PRNGKeyArray,
    **settings: Any,
) -> tuple[Float[Array, ""], Metrics, dict[str, Array]]:
    """(caption_weight * captioning loss in nats, metrics, embeddings) of images and captions.

    The embeddings, float32 of length 1, are those of `softmax_loss`: "image" [B, D] and "text"
    [B, K, D]. What they add to the loss, times contrastive_weight, is left to the caller.

    Args:
      memory_BQD: what `model.encode` made of the images.
      batch: `tokens` [B, L], or [B, K, L] with K captions an image: labels, 0 where there is none;
        `position` [B], on which beside the key the draws depend; what `coca_prepare` adds.
      settings: fields of `CoCaObjective`; its `weight` is left to the caller.

    The decoder reads the labels shifted right and the class token, which therefore sees all of a
    caption but the last of `text_length` tokens: the end, of a caption that fills them.

    Metrics, in nats where not said otherwise: caption_loss, what `caption_weight` multiplies;
    token_loss, mean over tokens; tokens_per_caption, a number of tokens; conditional_causal_loss
    and unconditional_causal_loss, means over captions that see their image and that do not, where
    images are dropped; z_loss, its part of caption_loss, where there is one.
    """
    objective = CoCaObjective(**settings)
    labels_RL = as_rows(batch["tokens"], (-1, batch["tokens"].shape[-1]))
    num_images, num_captions = len(memory_BQD), len(labels_RL) // len(memory_BQD)
    is_dropped_B = jnp.zeros_like(batch["position"], bool)
    seen_BQD = memory_BQD
    if objective.image_dropout:
        is_dropped_B = draw_dropped(batch, key, objective.image_dropout)
        seen_BQD = model.drop_memory(params, memory_BQD, is_dropped_B)
    is_dropped_R, seen_RQD = repeat((is_dropped_B, seen_BQD), num_captions)
    inputs_RL = decoder_inputs(labels_RL, None, model.mask_id)
    hidden_RLE, text_RD = model.hidden_and_text(params, inputs_RL, seen_RQD)
    weights_R = jnp.ones_like(is_dropped_R, jnp.float32)
    if objective.normalization == "token":
        weights_R = as_rows(batch["captioning_weights"], is_dropped_R.shape)
    loss, nll_RL, metrics = caption_loss(
        hidden_RLE,
        model.output_head(params),
        labels_RL,
        weights_R,
        vocab_size=model.config.vocab_size,
        label_smoothing=objective.label_smoothing,
        z_loss=objective.z_loss,
    )
    lengths_R = jnp.sum(labels_RL != PAD_ID, 1, dtype=jnp.float32)
    metrics["caption_loss"] = loss
    metrics["tokens_per_caption"] = masked_mean(lengths_R, jnp.ones_like(lengths_R, bool))
    if objective.image_dropout:
        means_R = caption_means(nll_RL, labels_RL)
        metrics["conditional_causal_loss"] = masked_mean(means_R, ~is_dropped_R)
        metrics["unconditional_causal_loss"] = masked_mean(means_R, is_dropped_R)
    embeddings = {
        "image": model.embed_image(params, memory_BQD),
        "text": text_RD.reshape((num_images, num_captions, -1), out_sharding=out_sharding(act_BLD)),
    }
    return objective.caption_weight * loss, metrics, embeddings
