"""The loss of an update on captions that were sampled and rewarded before.

Letters beyond `capjax.dims`: K captions sampled of each image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Batch, Metrics, Params
from capjax.models.captioner import Captioner
from capjax.objectives.captioning import captioning_rows
from capjax.objectives.metrics import masked_mean
from capjax.objectives.objective import Loss, mean_over_rows
from capjax.objectives.parallel_draw import as_rows
from capjax.objectives.policy_gradient import (
    PolicyGradient,
    divergence,
    preference_loss,
    surrogate,
    token_weights,
)
from capjax.rl.rollout import token_entropy, token_logprobs


def experience(
    batch: Batch,
    tokens_BKL: Array,
    behaviour_BKL: Array,
    reward_BK: Array,
    advantage_BK: Array,
    reference_BKL: Array | None,
    kl_weight: Array,
    policy: PolicyGradient,
) -> Batch:
    """The batch of an update: each array leads with B, so that it can be cut into microbatches.

    What is known of the whole batch alone is in it as weights.
    """
    mask_BKL = (tokens_BKL != PAD_ID) & batch["mask"][:, None, None]
    made = {
        "image": batch["image"],
        "position": batch["position"],
        "mask": batch["mask"],
        "sampled": tokens_BKL,
        "behaviour": behaviour_BKL,
        "reward": reward_BK,
        "advantage": advantage_BK,
        "weight": token_weights(mask_BKL, policy.aggregation),
        "kl_weight": jnp.zeros_like(batch["mask"], jnp.float32) + kl_weight,
    }
    if reference_BKL is not None:
        made["reference"] = reference_BKL
    if policy.preference_weight:
        _, counts_B = preference_loss(reward_BK, reward_BK, batch["mask"], 1.0)
        made["pair_weight"] = counts_B / jnp.maximum(jnp.mean(counts_B, dtype=jnp.float32), 1e-9)
    if policy.likelihood_weight:
        is_used = batch["mask"].reshape(-1, *(1,) * (batch["tokens"].ndim - 1))
        made["tokens"] = jnp.where(is_used, batch["tokens"], PAD_ID)
        share = jnp.maximum(jnp.mean(batch["mask"], dtype=jnp.float32), 1e-9)
        made["likelihood_scale"] = jnp.zeros_like(made["kl_weight"]) + 1 / share
    return made


def policy_loss(
    model: Captioner,
    policy: PolicyGradient,
    temperature: float,
    plain_params: Callable[[Params], Params] = lambda params: params,
    prefix: Sequence[int] = (),
) -> Loss:
    """The loss of batches that `experience` makes; `temperature`, `prefix` are those of sampling.

    `plain_params` gives the model's parameters from those that train. Metrics: `policy_loss` or
    `preference_loss`; `likelihood_loss`; `entropy`, nats a token; `kl`, nats a caption;
    `ratio_deviation`, the mean of |ratio - 1|; `clipped`, the share of tokens that clipping holds.
    """

    def rows(params: Params, batch: Batch, key: Any) -> tuple[Array, Metrics]:
        params = plain_params(params)
        memory_BPD = model.encode(params, batch["image"])
        tokens_BKL = batch["sampled"]
        mask_BKL = (tokens_BKL != PAD_ID) & batch["mask"][:, None, None]
        logprobs_BKL, hidden_RLE = token_logprobs(
            model, params, memory_BPD, tokens_BKL, temperature, prefix
        )
        if policy.preference_weight:
            loss, metrics = _preference(batch, logprobs_BKL, policy)
        else:
            loss, metrics = _surrogate(batch, logprobs_BKL, mask_BKL, policy)
        if policy.kl_weight:
            kl_BKL = divergence(logprobs_BKL, batch["reference"], policy.kl_estimator)
            if not policy.kl_in_reward:
                weight_BKL = batch["kl_weight"][:, None, None] * batch["weight"]
                loss += _mean_sum(weight_BKL * kl_BKL)
            per_caption_BK = jnp.sum(jnp.where(mask_BKL, kl_BKL, 0.0), 2)
            metrics["kl"] = masked_mean(per_caption_BK, jnp.any(mask_BKL, 2))
        if policy.entropy_weight:
            entropy_RL = token_entropy(model, params, hidden_RLE, temperature)
            entropy_BKL = as_rows(entropy_RL, tokens_BKL.shape)
            loss -= policy.entropy_weight * _mean_sum(batch["weight"] * entropy_BKL)
            metrics["entropy"] = masked_mean(entropy_BKL, mask_BKL)
        if policy.likelihood_weight:
            value, _ = captioning_rows(model, params, memory_BPD, batch, key, parallel_fraction=0.0)
            value *= jnp.mean(batch["likelihood_scale"])  # rows that fill the batch count as 0
            loss += policy.likelihood_weight * value
            metrics["likelihood_loss"] = value
        return loss, metrics

    return mean_over_rows(rows)


def _surrogate(
    batch: Batch, logprobs_BKL: Array, mask_BKL: Array, policy: PolicyGradient
) -> tuple[Array, Metrics]:
    cost_BKL, ratio_BKL, is_clipped_BKL = surrogate(
        logprobs_BKL, batch["behaviour"], batch["advantage"], mask_BKL, policy
    )
    loss = _mean_sum(batch["weight"] * cost_BKL)
    metrics: Metrics = {
        "policy_loss": loss,
        "ratio_deviation": masked_mean(jnp.abs(ratio_BKL - 1), mask_BKL),
    }
    if policy.is_clipped:
        metrics["clipped"] = masked_mean(is_clipped_BKL, mask_BKL)
    return loss, metrics


def _preference(batch: Batch, logprobs_BKL: Array, policy: PolicyGradient) -> tuple[Array, Metrics]:
    log_ratio_BK = jnp.sum(logprobs_BKL - batch["reference"], 2)
    cost_B, _ = preference_loss(
        log_ratio_BK, batch["reward"], batch["mask"], policy.preference_weight
    )
    loss = jnp.mean(batch["pair_weight"] * cost_B)
    return loss, {"preference_loss": loss}


def _mean_sum(values_BKL: Array) -> Array:
    """The mean over images of the sum over all else."""
    return jnp.mean(jnp.sum(values_BKL, (1, 2)))
