"""The captioning objective: causal (Cap) and parallel (CapPa) prediction of the same labels.

In causal mode position i sees the labels before i, in parallel mode only mask tokens, and both
predict labels[i]. The mode is drawn for each example. Source: Tschannen et al., "Image Captioners
Are Scalable Vision Learners Too" (2023).
"""

import dataclasses

import jax
import jax.numpy as jnp

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Batch, Bool, Float, Int, Metrics, Params, PRNGKeyArray, UInt
from capjax.errors import UserError
from capjax.models.captioner import Captioner
from capjax.objectives.cross_entropy import token_nll, weighted_nll
from capjax.objectives.metrics import Mean, masked_mean

__all__ = [
    "CaptioningObjective",
    "caption_means",
    "captioning_loss",
    "decoder_inputs",
    "draw_parallel",
    "mean_caption_loss",
    "token_nll",
    "weighted_nll",
]


@dataclasses.dataclass(frozen=True)
class CaptioningObjective:
    """`parallel_fraction`: probability of the parallel mode (0: Cap); `label_smoothing`."""

    parallel_fraction: float = 0.75
    label_smoothing: float = 0.0

    def __post_init__(self):
        if not 0 <= self.parallel_fraction <= 1:
            raise UserError(
                f"objective.parallel_fraction={self.parallel_fraction}: expected 0 (Cap) to 1"
            )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"objective.label_smoothing={self.label_smoothing}: expected 0 to less than 1"
            )


def decoder_inputs(
    labels_BL: Int[Array, "B L"], is_parallel_B: Bool[Array, "B"] | None, mask_id: int
) -> Int[Array, "B L"]:
    """What the decoder reads: labels shifted right behind a 0, or all `mask_id` where parallel.

    None for `is_parallel_B` means: every example is causal.
    """
    shifted_BL = jnp.pad(labels_BL[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID)
    if is_parallel_B is None:
        return shifted_BL
    return jnp.where(is_parallel_B[:, None], jnp.asarray(mask_id, labels_BL.dtype), shifted_BL)


def draw_parallel(
    key: PRNGKeyArray, position_B: UInt[Array, "B"], fraction: float
) -> Bool[Array, "B"]:
    """True with probability `fraction`, drawn from (key, position) of each example alone.

    The draw of an example therefore depends neither on the mesh nor on its batch companions.
    """

    def uniform(position):
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(uniform)(position_B) < fraction


def caption_means(nll_BL: Float[Array, "B L"], labels_BL: Int[Array, "B L"]) -> Float[Array, "B"]:
    """Mean nats over the tokens of each caption; 0 for a caption without tokens."""
    is_token_BL = labels_BL != PAD_ID
    return jnp.where(is_token_BL, nll_BL, 0).sum(1) / jnp.maximum(is_token_BL.sum(1), 1)


def mean_caption_loss(
    nll_BL: Float[Array, "B L"], labels_BL: Int[Array, "B L"]
) -> tuple[Float[Array, ""], Metrics]:
    """(mean over captions of their mean nats, metrics): short captions weigh as much as long ones.

    Metrics: `token_loss`, the mean over all tokens, and `tokens_per_caption`.
    """
    is_token_BL = labels_BL != PAD_ID
    lengths_B = is_token_BL.sum(1, dtype=jnp.float32)
    metrics = {
        "token_loss": masked_mean(nll_BL, is_token_BL),
        "tokens_per_caption": masked_mean(lengths_B, jnp.ones_like(lengths_B, bool)),
    }
    return jnp.mean(caption_means(nll_BL, labels_BL)), metrics


def captioning_loss(
    model: Captioner,
    params: Params,
    batch: Batch,
    key: PRNGKeyArray,
    *,
    parallel_fraction: float,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """(loss in nats, metrics) of a batch with `image`, `tokens` (the labels) and `position`.

    The metrics add to those of `mean_caption_loss` the loss of the causal and of the parallel
    examples apart, `causal_loss` and `parallel_loss`, each where it can occur. A `Mean` among them
    is divided by `reduce_metrics`. Raises `UserError` where the model has no mask token to read.
    """
    labels_BL = batch["tokens"]
    is_parallel_B = None
    if parallel_fraction > 0:
        if not model.config.mask_token:
            raise UserError(
                f"objective.parallel_fraction={parallel_fraction} needs a mask token: "
                "set model.mask_token=True, or the fraction to 0"
            )
        is_parallel_B = draw_parallel(key, batch["position"], parallel_fraction)
    patches_BPD = model.encode(params, batch["image"])
    inputs_BL = decoder_inputs(labels_BL, is_parallel_B, model.mask_id)
    hidden_BLE = model.hidden(params, inputs_BL, patches_BPD, is_parallel_B)
    is_token_BL = labels_BL != PAD_ID
    lengths_B = jnp.maximum(is_token_BL.sum(1), 1)
    loss, nll_BL = weighted_nll(
        hidden_BLE,
        *model.output_head(params),
        labels_BL,
        is_token_BL / (lengths_B[:, None] * len(lengths_B)),
        vocab_size=model.config.vocab_size,
        label_smoothing=label_smoothing,
    )
    _, metrics = mean_caption_loss(nll_BL, labels_BL)
    return loss, metrics | _loss_by_mode(nll_BL, labels_BL, is_parallel_B, parallel_fraction)


def _loss_by_mode(nll_BL, labels_BL, is_parallel_B, parallel_fraction: float) -> dict[str, Mean]:
    means_B = caption_means(nll_BL, labels_BL)
    if is_parallel_B is None:
        is_parallel_B = jnp.zeros_like(means_B, bool)
    losses = {}
    if parallel_fraction < 1:
        losses["causal_loss"] = masked_mean(means_B, ~is_parallel_B)
    if parallel_fraction > 0:
        losses["parallel_loss"] = masked_mean(means_B, is_parallel_B)
    return losses
