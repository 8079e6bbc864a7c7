"""The captioning objective: causal (Cap) and parallel (CapPa) prediction of the same labels.

In causal mode position i sees the labels before i, in parallel mode only mask tokens (or, with a
masking ratio below 1, the labels that are not masked), and both predict labels[i]. Source:
Tschannen et al., "Image Captioners Are Scalable Vision Learners Too" (2023). Parallel rows alone,
a ratio below 1 and only masked positions scored: that is masked language modelling conditioned on
the image, Sariyildiz et al., "Learning Visual Representations with Caption Annotations" (2020).

Letters beyond `capjax.dims`: R rows, the captions of all images; G groups of J consecutive rows.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Batch, Float, Metrics, Params, PRNGKeyArray
from capjax.errors import UserError
from capjax.models.captioner import Captioner
from capjax.objectives.caption_loss import Smile, caption_loss, caption_means
from capjax.objectives.caption_rows import (
    CaptionRows,
    decoder_inputs,
    draw_caption_rows,
    draw_dropped,
    repeat,
)
from capjax.objectives.captioning_objective import CaptioningObjective
from capjax.objectives.cross_entropy import token_nll
from capjax.objectives.metrics import Mean, masked_mean
from capjax.objectives.parallel_draw import as_rows, join_groups, take_in_groups

__all__ = [
    "CaptioningObjective",
    "caption_means",
    "captioning_loss",
    "captioning_prepare",
    "captioning_rows",
    "decoder_inputs",
    "token_nll",
]


def captioning_loss(
    model: Captioner, params: Params, batch: Batch, key: PRNGKeyArray, **settings: Any
) -> tuple[Float[Array, ""], Metrics]:
    """(loss in nats, metrics) of a whole batch with `image`, `tokens` and `position`.

    `captioning_rows` behind the image encoder; the settings are those of `CaptioningObjective`.
    """
    batch = captioning_prepare(batch, key, **settings)
    memory_BPD = model.encode(params, batch["image"])
    return captioning_rows(model, params, memory_BPD, batch, key, **settings)


def captioning_prepare(batch: Batch, key: PRNGKeyArray, **settings: Any) -> Batch:
    """What must be known of the whole batch before it is cut, added to it; the key is the same.

    normalization="token" adds `captioning_weights`, shaped as `tokens` without the last axis: the
    scored tokens of each caption / their mean over the batch. So weighted, the mean over captions
    of their means over tokens is the mean over all tokens.
    """
    objective = CaptioningObjective(**settings)
    if objective.normalization == "caption":
        return batch
    rows, _ = draw_caption_rows(batch, key, objective)
    counts_R = rows.is_scored_RL.sum(1, dtype=jnp.float32)
    weights_R = counts_R / jnp.maximum(jnp.mean(counts_R), 1e-6)
    return batch | {"captioning_weights": as_rows(weights_R, batch["tokens"].shape[:-1])}


def captioning_rows(
    model: Captioner,
    params: Params,
    memory_BPD: Float[Array, "B P D"],
    batch: Batch,
    key: PRNGKeyArray,
    **settings: Any,
) -> tuple[Float[Array, ""], Metrics]:
    """(loss in nats, metrics) of images encoded as `memory_BPD` and their captions.

    Args:
      batch: `tokens` [B, L], or [B, K, L] with K captions an image: labels, 0 where there is none;
        `position` [B], on which beside the key the draws of an image depend; and what
        `captioning_prepare` adds.
      settings: fields of `CaptioningObjective`; its `weight` is left to the caller.

    The loss is a mean over images of the mean over their captions. Metrics, in nats where not said
    otherwise and without the z-loss:
      token_loss: mean over scored tokens.
      tokens_per_caption: a number of tokens.
      causal_loss, parallel_loss: means over the captions of a mode, each where it can occur.
      conditional_causal_loss, unconditional_causal_loss: over causal captions that see their image
        and that do not, where images are dropped.
      z_loss: its part of the loss, where there is one.
      smile_loss: mean over the tokens that SMILE scores, where it does.
    A `Mean` among them is divided by `reduce_metrics`. Raises `UserError` where the model has no
    mask token to read.
    """
    objective = CaptioningObjective(**settings)
    _check_mask_token(model, objective)
    rows, orders_GJ = draw_caption_rows(batch, key, objective)
    is_dropped_B = jnp.zeros_like(batch["position"], bool)
    if objective.image_dropout:
        is_dropped_B = draw_dropped(batch, key, objective.image_dropout)
        memory_BPD = model.drop_memory(params, memory_BPD, is_dropped_B)
    num_captions = len(rows.labels_RL) // len(memory_BPD)
    is_dropped_R, memory_RPD = repeat((is_dropped_B, memory_BPD), num_captions)
    weights_R = jnp.ones_like(is_dropped_R, jnp.float32)
    if objective.normalization == "token":
        weights_R = as_rows(batch["captioning_weights"], is_dropped_R.shape)
    hidden_RLE = _hidden(model, params, memory_RPD, rows, orders_GJ, objective)
    if orders_GJ is not None:  # the others follow the order of the hidden states
        rows, is_dropped_R, weights_R = join_groups(
            take_in_groups((rows, is_dropped_R, weights_R), orders_GJ)
        )
    labels_RL = jnp.where(rows.is_scored_RL, rows.labels_RL, PAD_ID)
    loss, nll_RL, metrics = caption_loss(
        hidden_RLE,
        model.output_head(params),
        labels_RL,
        weights_R,
        vocab_size=model.config.vocab_size,
        label_smoothing=objective.label_smoothing,
        z_loss=objective.z_loss,
        smile=Smile(objective.smile_weight, objective.smile_first_token, objective.smile_subset),
    )
    lengths_R = jnp.sum(rows.labels_RL != PAD_ID, 1, dtype=jnp.float32)
    metrics["tokens_per_caption"] = masked_mean(lengths_R, jnp.ones_like(lengths_R, bool))
    means_R = caption_means(nll_RL, labels_RL)
    return loss, metrics | _loss_by_mode(means_R, rows.is_parallel_R, is_dropped_R, objective)


def _hidden(
    model: Captioner, params, memory_RPD, rows: CaptionRows, orders_GJ, objective
) -> Float[Array, "R L E"]:
    """The decoder's states, in the order of the rows or, where given, of their groups."""
    is_parallel_R = rows.is_parallel_R if objective.parallel_fraction else None
    inputs_RL = decoder_inputs(rows.labels_RL, is_parallel_R, model.mask_id, rows.is_masked_RL)

    def causal(inputs_RL, memory_RPD):
        return model.hidden(params, inputs_RL, memory_RPD)

    def parallel(inputs_RL, memory_RPD):
        if rows.is_masked_RL is None:
            return model.parallel_hidden(params, memory_RPD, inputs_RL.shape[1])
        return model.hidden(params, inputs_RL, memory_RPD, True)

    if not objective.is_mixed:
        return (parallel if objective.parallel_fraction else causal)(inputs_RL, memory_RPD)
    if orders_GJ is None:
        return model.hidden(params, inputs_RL, memory_RPD, is_parallel_R)

    def run(mode, *part_GJ):
        hidden_RLE = mode(*join_groups(part_GJ))
        return as_rows(hidden_RLE, (len(orders_GJ), -1, *hidden_RLE.shape[1:]))

    sizes = objective.group_causal, objective.group_size - objective.group_causal
    inputs_GJL, memories_GJPD = (
        lax.split(x, sizes, axis=1) for x in take_in_groups((inputs_RL, memory_RPD), orders_GJ)
    )
    causal_GJLE = run(causal, inputs_GJL[0], memories_GJPD[0])
    parallel_GJLE = run(parallel, inputs_GJL[1], memories_GJPD[1])
    return join_groups(jnp.concatenate([causal_GJLE, parallel_GJLE], 1))


def _check_mask_token(model: Captioner, objective: CaptioningObjective) -> None:
    if objective.parallel_fraction and not model.config.mask_token:
        raise UserError(
            f"objective.captioning.parallel_fraction={objective.parallel_fraction} needs a mask "
            "token: set model.mask_token=True, or the fraction to 0"
        )


def _loss_by_mode(
    means_R, is_parallel_R, is_dropped_R, objective: CaptioningObjective
) -> dict[str, Mean]:
    masks = {}
    if objective.parallel_fraction < 1:
        masks["causal_loss"] = ~is_parallel_R
        if objective.image_dropout:
            masks["conditional_causal_loss"] = ~is_parallel_R & ~is_dropped_R
            masks["unconditional_causal_loss"] = ~is_parallel_R & is_dropped_R
    if objective.parallel_fraction:
        masks["parallel_loss"] = is_parallel_R
    return {name: masked_mean(means_R, mask) for name, mask in masks.items()}
