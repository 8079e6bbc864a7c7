"""From the decoder's states to the loss of captions: a mean over captions of a mean over tokens."""

from typing import NamedTuple

import jax.numpy as jnp

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Float, Int, Metrics
from capjax.objectives.cross_entropy import weighted_nll
from capjax.objectives.metrics import masked_mean
from capjax.objectives.smile import smile_nll


class Smile(NamedTuple):
    """How much of the loss is `smile_nll`, and of what; the rest is likelihood."""

    weight: float = 0.0
    first_token: bool = True  # the first position is scored by likelihood alone
    subset: str = "label"


LIKELIHOOD = Smile()  # none of it


def caption_loss(
    hidden_RLE: Float[Array, "R L E"],
    head: tuple[Float[Array, "E V"], Float[Array, "V"]],
    labels_RL: Int[Array, "R L"],
    weights_R: Float[Array, "R"],
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    smile: Smile = LIKELIHOOD,
) -> tuple[Float[Array, ""], Float[Array, "R L"], Metrics]:
    """(mean over rows of weight * mean over tokens, nats of each token, metrics).

    `head`: kernel and bias behind the hidden states. Label 0 is not scored. Metrics: `token_loss`,
    and `z_loss` and `smile_loss`, a mean over scored tokens, where there are such.
    """
    is_scored_RL = labels_RL != PAD_ID
    counts_R = jnp.maximum(is_scored_RL.sum(1), 1) * len(labels_RL)
    weights_RL = is_scored_RL * (weights_R / counts_R)[:, None]
    is_smile_RL = is_scored_RL & (jnp.arange(labels_RL.shape[1]) >= smile.first_token)[None]
    smile_RL = smile.weight * weights_RL * is_smile_RL
    likelihood_RL = weights_RL - smile_RL
    loss, nll_RL = weighted_nll(
        hidden_RLE,
        *head,
        labels_RL,
        likelihood_RL,
        vocab_size=vocab_size,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    metrics: Metrics = {"token_loss": masked_mean(nll_RL, is_scored_RL)}
    if z_loss:
        metrics["z_loss"] = loss - jnp.sum(likelihood_RL * nll_RL)
    if smile.weight:
        of_subset_RL = smile_nll(
            hidden_RLE, *head, labels_RL, vocab_size=vocab_size, subset=smile.subset
        )
        loss += jnp.sum(smile_RL * of_subset_RL)
        metrics["smile_loss"] = masked_mean(of_subset_RL, is_smile_RL)
    return loss, nll_RL, metrics


def caption_means(nll_BL: Float[Array, "B L"], labels_BL: Int[Array, "B L"]) -> Float[Array, "B"]:
    """Mean nats over the tokens of each caption; 0 for a caption without tokens."""
    is_token_BL = labels_BL != PAD_ID
    return jnp.where(is_token_BL, nll_BL, 0).sum(1) / jnp.maximum(is_token_BL.sum(1), 1)
