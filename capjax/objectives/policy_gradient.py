"""Policy gradients for captions: advantages, clipped ratios, penalties, and how tokens are summed.

One learner with switches; what the literature calls REINFORCE, SCST, RLOO, GRPO, Dr. GRPO, DAPO,
PPO's clip and GSPO are choices of them (`ALGORITHMS`), and DPO is a loss of its own. All of it is
plain functions of arrays of the global batch.

Letters beyond `capjax.dims`: K captions sampled of each image.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from capjax.dims import Array, Bool, Float
from capjax.errors import UserError

BASELINES = ("leave_one_out", "group_mean", "greedy", "running_mean", "none")
AGGREGATIONS = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_mean_token_scale",
)
ESTIMATORS = ("k1", "k2", "k3")

# What the published algorithms choose; what is not named is as in `PolicyGradient`.
ALGORITHMS = {
    "reinforce": {"baseline": "running_mean", "aggregation": "sequence_mean_token_mean"},
    "scst": {"baseline": "greedy"},
    "rloo": {"baseline": "leave_one_out"},
    "grpo": {
        "baseline": "group_mean",
        "scale_by_std": True,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "sequence_mean_token_mean",
        "kl_weight": 0.04,
        "kl_estimator": "k3",
    },
    "dr_grpo": {
        "baseline": "group_mean",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "sequence_mean_token_scale",
    },
    "dapo": {
        "baseline": "group_mean",
        "scale_by_std": True,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "aggregation": "token_mean",
    },
    "ppo": {"baseline": "running_mean", "whiten": True, "clip_low": 0.2, "clip_high": 0.2},
    "gspo": {
        "baseline": "group_mean",
        "scale_by_std": True,
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "sequence_ratio": True,
        "aggregation": "sequence_mean_token_mean",
    },
    "dpo": {"preference_weight": 0.1, "baseline": "none"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """How rewards become a loss.

    Attributes:
      baseline: what a caption's reward is compared with: "leave_one_out", the mean of the other
        captions of its image (RLOO, Ahmadian et al. 2024; "new self-critical", Luo 2020);
        "group_mean", that of all of them; "greedy", the greedy caption's (SCST, Rennie et al.
        2017); "running_mean", the mean over all batches before (REINFORCE, Williams 1992; Dessì et
        al. 2023); "none".
      scale_by_std: divides by the standard deviation over the image's captions (GRPO, Shao et al.
        2024), which is at least `std_floor`.
      std_floor: near-ties are not blown up beyond this.
      whiten: advantages of the batch get mean 0 and standard deviation 1.
      clip_low, clip_high: the probability ratio to the captions' sampler is clipped to
        [1 - clip_low, 1 + clip_high] (PPO, Schulman et al. 2017); 0 for both: not clipped.
      sequence_ratio: one ratio a caption, the geometric mean of its tokens' (GSPO, Zheng et al.
        2025).
      aggregation: "token_mean", over all tokens of the global batch; "sequence_mean_token_mean",
        over captions of the mean over their tokens; "sequence_mean_token_sum", of the sum;
        "sequence_mean_token_scale", of the sum over the longest possible length (Dr. GRPO, Liu et
        al. 2025).
      kl_weight: of the divergence from the frozen reference; 0: there is no reference.
      kl_estimator: per token, with the log-ratio r = log p - log p_reference: "k1" is r, "k2" is
        r^2 / 2, "k3" is exp(-r) - 1 + r (Schulman 2020).
      kl_in_reward: takes the weight times the sum of a caption's divergence off its reward, and
        "k1" must be; otherwise the divergence is added to the loss.
      kl_target: where above 0 the weight moves so that the divergence, in nats a caption, comes to
        it (Ziegler et al. 2019).
      entropy_weight: of the entropy of each token's distribution, taken off the loss.
      likelihood_weight: of the captioning loss of the reference captions, added.
      preference_weight: above 0 the loss is that of DPO (Rafailov et al. 2023), with this beta,
        for the best and the worst of an image's captions by reward.
    """

    baseline: str = "leave_one_out"
    scale_by_std: bool = False
    std_floor: float = 1e-3
    whiten: bool = False
    clip_low: float = 0.0
    clip_high: float = 0.0
    sequence_ratio: bool = False
    aggregation: str = "token_mean"
    kl_weight: float = 0.0
    kl_estimator: str = "k3"
    kl_in_reward: bool = False
    kl_target: float = 0.0
    entropy_weight: float = 0.0
    likelihood_weight: float = 0.0
    preference_weight: float = 0.0

    def __post_init__(self):
        for name, choices in {
            "baseline": BASELINES,
            "aggregation": AGGREGATIONS,
            "kl_estimator": ESTIMATORS,
        }.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"policy.{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float and not 0 <= value < math.inf:
                raise UserError(f"policy.{field.name}={value}: expected 0 or more")
        if self.scale_by_std and self.baseline not in ("leave_one_out", "group_mean"):
            raise UserError(
                f"policy.scale_by_std with policy.baseline={self.baseline!r}: where an image's "
                "captions are equally good their deviation is 0 and the advantage is not; take "
                "group_mean, or policy.whiten"
            )
        if self.clip_low >= 1:
            raise UserError(f"policy.clip_low={self.clip_low}: expected less than 1")
        if self.is_clipped and not (self.clip_low and self.clip_high):
            raise UserError(
                f"policy.clip_low={self.clip_low}, policy.clip_high={self.clip_high}: set both "
                "above 0, or both to 0"
            )
        if self.kl_estimator == "k1" and self.kl_weight and not self.kl_in_reward:
            raise UserError(
                "policy.kl_estimator='k1' in the loss has a gradient of mean 0; set "
                "policy.kl_in_reward, or take k2 or k3"
            )
        if self.kl_target and not self.kl_weight:
            raise UserError(
                f"policy.kl_target={self.kl_target} moves policy.kl_weight, which is 0; set a "
                "weight to begin with"
            )

    @property
    def is_clipped(self) -> bool:
        """Whether ratios are."""
        return self.clip_low > 0 or self.clip_high > 0

    @property
    def has_reference(self) -> bool:
        """Whether the frozen reference takes part."""
        return self.kl_weight > 0 or self.preference_weight > 0


def advantages(
    reward_BK: Float[Array, "B K"],
    mask_B: Bool[Array, "B"],
    policy: PolicyGradient,
    *,
    greedy_B: Float[Array, "B"] | None = None,
    running_mean: Float[Array, ""] | None = None,
) -> Float[Array, "B K"]:
    """By how much each caption is better than its baseline; 0 in rows that `mask_B` leaves out.

    `greedy_B`: rewards of the greedy captions, `running_mean`: of the batches before; each for the
    baseline of its name. Where an image's captions all have one reward, "leave_one_out" and
    "group_mean" give exactly 0.
    """
    num_captions = reward_BK.shape[1]
    mean_B1 = jnp.mean(reward_BK, 1, keepdims=True)
    if policy.baseline in ("leave_one_out", "group_mean"):
        advantage_BK = reward_BK - mean_B1
        is_tie_B1 = jnp.all(reward_BK == reward_BK[:, :1], axis=1, keepdims=True)
        advantage_BK = jnp.where(is_tie_B1, 0.0, advantage_BK)
        if policy.baseline == "leave_one_out":
            advantage_BK *= num_captions / (num_captions - 1)
    elif policy.baseline == "greedy":
        assert greedy_B is not None
        advantage_BK = reward_BK - greedy_B[:, None]
    elif policy.baseline == "running_mean":
        assert running_mean is not None
        advantage_BK = reward_BK - running_mean
    else:
        advantage_BK = reward_BK
    if policy.scale_by_std:
        squares_BK = jnp.square(reward_BK - mean_B1)
        std_B1 = jnp.sqrt(jnp.sum(squares_BK, 1, keepdims=True) / (num_captions - 1))
        advantage_BK = advantage_BK / (jnp.maximum(std_B1, policy.std_floor) + 1e-6)
    mask_BK = jnp.broadcast_to(mask_B[:, None], advantage_BK.shape)
    advantage_BK = jnp.where(mask_BK, advantage_BK, 0.0)
    if policy.whiten:
        count = jnp.maximum(jnp.sum(mask_BK), 1)
        mean = jnp.sum(advantage_BK) / count
        squares_BK = jnp.where(mask_BK, jnp.square(advantage_BK - mean), 0.0)
        std = jnp.maximum(jnp.sqrt(jnp.sum(squares_BK) / count), policy.std_floor)
        advantage_BK = jnp.where(mask_BK, (advantage_BK - mean) / (std + 1e-6), 0.0)
    return lax.stop_gradient(advantage_BK)


def token_weights(mask_BKL: Bool[Array, "B K L"], aggregation: str) -> Float[Array, "B K L"]:
    """Weights with which the mean over images of the weighted sum over tokens is the aggregation.

    `mask_BKL` holds at the tokens of captions, the first end included. Captions without a token
    count for nothing.
    """
    counts_BK1 = jnp.sum(mask_BKL, 2, keepdims=True, dtype=jnp.float32)
    if aggregation == "token_mean":
        scale = 1 / jnp.maximum(jnp.sum(counts_BK1), 1)
    else:
        num_captions = jnp.maximum(jnp.sum(counts_BK1 > 0), 1)
        scale = {
            "sequence_mean_token_mean": 1 / jnp.maximum(counts_BK1, 1),
            "sequence_mean_token_sum": jnp.ones(()),
            "sequence_mean_token_scale": jnp.float32(1 / mask_BKL.shape[2]),
        }[aggregation] / num_captions
    return mask_BKL * scale * mask_BKL.shape[0]


def surrogate(
    logprobs_BKL: Float[Array, "B K L"],
    behaviour_BKL: Float[Array, "B K L"],
    advantage_BK: Float[Array, "B K"],
    mask_BKL: Bool[Array, "B K L"],
    policy: PolicyGradient,
) -> tuple[Float[Array, "B K L"], Float[Array, "B K L"], Bool[Array, "B K L"]]:
    """(cost, ratio, whether clipping holds it) of each token: -min(ratio A, clipped ratio A).

    `behaviour_BKL` are the log-probabilities with which the tokens were sampled. Where they are
    those of now, the gradient is that of -A log p.
    """
    log_ratio_BKL = jnp.where(mask_BKL, logprobs_BKL - lax.stop_gradient(behaviour_BKL), 0.0)
    if policy.sequence_ratio:
        counts_BK1 = jnp.maximum(jnp.sum(mask_BKL, 2, keepdims=True), 1)
        mean_BK1 = jnp.sum(log_ratio_BKL, 2, keepdims=True) / counts_BK1
        # Of the sequence in value; each token has its own gradient (GSPO-token).
        log_ratio_BKL = logprobs_BKL - lax.stop_gradient(logprobs_BKL) + lax.stop_gradient(mean_BK1)
        log_ratio_BKL = jnp.where(mask_BKL, log_ratio_BKL, 0.0)
    ratio_BKL = jnp.exp(log_ratio_BKL)
    plain_BKL = ratio_BKL * advantage_BK[:, :, None]
    if not policy.is_clipped:
        return -plain_BKL, ratio_BKL, jnp.zeros_like(mask_BKL)
    clipped_BKL = jnp.clip(ratio_BKL, 1 - policy.clip_low, 1 + policy.clip_high)
    clipped_BKL *= advantage_BK[:, :, None]
    return -jnp.minimum(plain_BKL, clipped_BKL), ratio_BKL, (clipped_BKL < plain_BKL) & mask_BKL


def divergence(
    logprobs: Float[Array, "*A"], reference: Float[Array, "*A"], estimator: str
) -> Float[Array, "*A"]:
    """The estimate of KL(policy || reference) at each token that the policy sampled, in nats."""
    log_ratio = logprobs - reference
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return jnp.square(log_ratio) / 2
    return jnp.expm1(-log_ratio) + log_ratio


def preference_loss(
    log_ratio_BK: Float[Array, "B K"],
    reward_BK: Float[Array, "B K"],
    mask_B: Bool[Array, "B"],
    beta: float,
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """(DPO's loss, whether it counts) of each image, for the best and the worst of its captions.

    `log_ratio_BK` is log p - log p_reference of whole captions. Of equals the first is taken; an
    image whose captions are all as good as each other, or that `mask_B` leaves out, does not count
    and costs 0.
    """
    columns_K = jnp.arange(reward_BK.shape[1])
    is_best_BK = columns_K[None] == jnp.argmax(reward_BK, 1)[:, None]
    is_worst_BK = columns_K[None] == jnp.argmin(reward_BK, 1)[:, None]
    margin_B = jnp.sum(jnp.where(is_best_BK, log_ratio_BK, 0.0), 1)
    margin_B -= jnp.sum(jnp.where(is_worst_BK, log_ratio_BK, 0.0), 1)
    counts_B = mask_B & (jnp.max(reward_BK, 1) > jnp.min(reward_BK, 1))
    return jnp.where(counts_B, -jax.nn.log_sigmoid(beta * margin_B), 0.0), counts_B


def next_kl_weight(
    weight: Float[Array, ""], divergence_per_caption: Float[Array, ""], target: float
) -> Float[Array, ""]:
    """The weight after a batch: it moves by at most 2 % towards what gives the target.

    Ziegler et al. 2019, equation 5, whose error is clipped to 0.2 and multiplied by 0.1.
    """
    error = jnp.clip(divergence_per_caption / target - 1, -0.2, 0.2)
    return weight * (1 + 0.1 * error)
