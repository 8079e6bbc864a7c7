"""One step of reinforcement: captions are sampled, rewarded, and made more or less probable.

Where every reward is of the device, all of it is one compiled program. Rewards of the host part it
in two (`capjax.rl.host`), `sampled` and `learned` here.

Letters beyond `capjax.dims`: K captions sampled of each image; J with the greedy one behind them,
where that is the baseline.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.dims import Array, Batch, Float, Metrics, Params
from capjax.errors import UserError
from capjax.models.captioner import Captioner
from capjax.objectives.policy_gradient import (
    PolicyGradient,
    advantages,
    divergence,
    next_kl_weight,
)
from capjax.rewards.normalize import normalize
from capjax.rewards.text_shape import repetition_penalty
from capjax.rl.rollout import Rollout, sample, token_logprobs
from capjax.rl.state import Learner, ReinforceState
from capjax.rl.update import experience, policy_loss
from capjax.training.step import make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How captions to learn from are made.

    Attributes:
      num_samples: captions of each image.
      temperature: divides the logits; 0 takes the greedy caption alone (Dessì et al. 2023). The
        update raises and lowers probabilities of the same, tempered distribution.
      max_length: tokens of a caption at most, its end included, its prefix not; 0: as many as the
        prefix leaves of the model's text length.
      prefix: a text that captions stand behind, such as the bin of captions that fit well. It is
        given, not sampled, and no part of what is rewarded.
      num_updates: updates of the parameters by each batch of captions.
    """

    num_samples: int = 5
    temperature: float = 1.0
    max_length: int = 0
    prefix: str = ""
    num_updates: int = 1

    def __post_init__(self):
        for name, least in (("num_samples", 1), ("max_length", 0), ("num_updates", 1)):
            if getattr(self, name) < least:
                raise UserError(f"sampling.{name}={getattr(self, name)}: expected at least {least}")
        if not 0 <= self.temperature <= 10:
            raise UserError(f"sampling.temperature={self.temperature}: expected 0 to 10")
        if self.temperature == 0 and self.num_samples > 1:
            raise UserError(
                f"sampling.num_samples={self.num_samples} with temperature=0: greedy captions of "
                "an image are all the same; set num_samples=1, or a temperature"
            )


def check_policy(policy: PolicyGradient, sampling: Sampling) -> None:
    """Raises `UserError` where the two do not go together."""
    if policy.baseline == "greedy" and sampling.temperature == 0:
        raise UserError(
            "policy.baseline='greedy' with sampling.temperature=0 compares a caption with itself; "
            "take running_mean, or a temperature"
        )
    compares = policy.baseline in ("leave_one_out", "group_mean") or policy.scale_by_std
    if sampling.num_samples < 2 and (compares or policy.preference_weight):
        raise UserError(
            f"sampling.num_samples={sampling.num_samples}: policy.baseline={policy.baseline!r} "
            "compares the captions of an image; sample 2 or more, or take greedy or running_mean"
        )
    if sampling.num_updates > 1 and not (policy.is_clipped or policy.preference_weight):
        raise UserError(
            f"sampling.num_updates={sampling.num_updates} without clipping strays from what was "
            "sampled; set policy.clip_low and policy.clip_high, or one update"
        )


class Reward(NamedTuple):
    """One reward among those that are summed.

    `compute(frozen, batch, tokens_BJL, given)` -> float32 [B, J], on the device: `frozen` are
    parameters that do not train, `given` what the host made of the captions.
    """

    name: str
    weight: float
    compute: Callable[[Any, Batch, Array, Batch], Float[Array, "B J"]]
    normalize: str = "none"


class Step(NamedTuple):
    """The parts of a step, for one program or two. All are to be jitted, within the mesh.

    sampled: (state, batch) -> captions [B, J, L].
    learned: (state, frozen, batch, captions, given) -> (state, metrics).
    """

    sampled: Callable[[ReinforceState, Batch], Rollout]
    learned: Callable[..., tuple[ReinforceState, Metrics]]

    def whole(
        self, state: ReinforceState, frozen: Any, batch: Batch
    ) -> tuple[ReinforceState, Metrics]:
        """Both, where the host has no part."""
        return self.learned(state, frozen, batch, self.sampled(state, batch), {})


def make_step(
    model: Captioner,
    policy: PolicyGradient,
    sampling: Sampling,
    rewards: Sequence[Reward],
    tx: optax.GradientTransformation,
    *,
    learning_rate: Callable | None = None,
    accumulation_steps: int = 1,
    freeze: Sequence[str] = (),
    ema_decay: float = 0.0,
    may_lower_rate: bool = False,
    prefix: Sequence[int] = (),
    plain_params: Callable[[Params], Params] = lambda params: params,
    reference_params: Callable[[Params, Any], Params] = lambda params, frozen: frozen["reference"],
) -> Step:
    """The step of a policy.

    Args:
      tx, learning_rate, accumulation_steps, freeze, ema_decay: as in `make_train_step`; the
        schedule counts updates.
      may_lower_rate: whether `Learner.rate_scale` may be other than 1.
      prefix: the ids of `sampling.prefix`.
      plain_params: the model's parameters from those of the state.
      reference_params: (params of the state, frozen) -> those of the frozen reference.

    Metrics, beside those of `policy_loss` and `make_train_step`, means over valid captions:
      reward: the weighted sum of the rewards as they are, divergence not taken off; reward_NAME.
      reward_std: over an image's captions.
      advantage_scale: the root mean square of the advantages.
      caption_tokens; repetition: the share of repeated pairs of tokens; unfinished: the share of
        captions that did not end within the length.
      kl_weight, rate_scale: where they may change.

    Raises `UserError` where policy and sampling do not go together.
    """
    check_policy(policy, sampling)
    update = make_train_step(
        policy_loss(model, policy, sampling.temperature, plain_params, prefix),
        tx,
        learning_rate=learning_rate,
        accumulation_steps=accumulation_steps,
        freeze=freeze,
        ema_decay=ema_decay,
    )

    def sampled(state: ReinforceState, batch: Batch) -> Rollout:
        params = plain_params(state.params)
        memory_BPD = model.encode(params, batch["image"])
        # The positions tell batches apart: when a batch is sampled changes no draw.
        draw = functools.partial(
            sample, model, params, memory_BPD, batch["position"], batch["mask"], state.key
        )
        length = {"max_length": sampling.max_length or None, "prefix": prefix}
        made = draw(num_samples=sampling.num_samples, temperature=sampling.temperature, **length)
        if policy.baseline != "greedy":
            return made
        greedy = draw(num_samples=1, temperature=0.0, **length)
        return Rollout(*(jnp.concatenate(pair, 1) for pair in zip(made, greedy, strict=True)))

    def learned(
        state: ReinforceState, frozen: Any, batch: Batch, captions: Rollout, given: Batch
    ) -> tuple[ReinforceState, Metrics]:
        K, mask_B, learner = sampling.num_samples, batch["mask"], state.learner
        tokens_BKL, behaviour_BKL = (x[:, :K] for x in captions)
        total_BJ, metrics, plain_BK = _sum(rewards, frozen, batch, captions.tokens_BKL, given, K)
        reference_BKL = None
        if policy.has_reference:
            params = reference_params(state.params, frozen)
            memory_BPD = model.encode(params, batch["image"])
            reference_BKL, _ = token_logprobs(
                model, params, memory_BPD, tokens_BKL, sampling.temperature, prefix
            )
        reward_BK = total_BJ[:, :K]
        if reference_BKL is not None and policy.kl_weight and policy.kl_in_reward:
            kl_BKL = divergence(behaviour_BKL, reference_BKL, policy.kl_estimator)
            reward_BK = reward_BK - learner.kl_weight * jnp.sum(kl_BKL, 2)
        advantage_BK = advantages(
            reward_BK,
            mask_B,
            policy,
            greedy_B=total_BJ[:, -1] if policy.baseline == "greedy" else None,
            running_mean=learner.running_mean,
        )
        made = experience(
            batch,
            tokens_BKL,
            behaviour_BKL,
            reward_BK,
            advantage_BK,
            reference_BKL,
            learner.kl_weight,
            policy,
        )
        train, update_metrics = _updates(update, state, made, sampling.num_updates)
        if may_lower_rate:
            train = train._replace(params=_scaled(state.params, train.params, learner.rate_scale))
            metrics["rate_scale"] = learner.rate_scale
        valid_BK = jnp.broadcast_to(mask_B[:, None], reward_BK.shape)
        metrics |= _reward_metrics(plain_BK, advantage_BK, tokens_BKL, valid_BK)
        learner = _next_learner(learner, reward_BK, valid_BK, update_metrics, policy)
        if policy.kl_target:
            metrics["kl_weight"] = state.learner.kl_weight
        after = state._replace(
            step=state.step + 1,
            params=train.params,
            opt_state=train.opt_state,
            ema=train.ema,
            learner=learner,
        )
        return after, {**metrics, **update_metrics}

    return Step(sampled, learned)


def _sum(
    rewards: Sequence[Reward],
    frozen: Any,
    batch: Batch,
    tokens_BJL: Array,
    given: Batch,
    num_samples: int,
) -> tuple[Array, Metrics, Array]:
    """(the sum to learn from, the means of each reward, the sum as it is).

    The last two are of the `num_samples` captions that were sampled, not of the greedy one.
    """
    total_BJ = jnp.zeros_like(tokens_BJL[:, :, 0], jnp.float32)
    plain_BK = total_BJ[:, :num_samples]
    metrics = {}
    for reward in rewards:
        value_BJ = reward.compute(frozen, batch, tokens_BJL, given)
        value_BK = value_BJ[:, :num_samples]
        valid_BK = jnp.broadcast_to(batch["mask"][:, None], value_BK.shape)
        metrics[f"reward_{reward.name}"] = _mean(value_BK, valid_BK)
        plain_BK += reward.weight * value_BK
        total_BJ += reward.weight * normalize(value_BJ, reward.normalize, batch["mask"])
    return lax.stop_gradient(total_BJ), metrics, plain_BK


def _updates(update: Callable, state: ReinforceState, made: Batch, num_updates: int):
    """The training state after so many updates, whose steps the schedule counts; last metrics.

    `nonfinite` is 1 where any of the updates was skipped.
    """
    train, metrics = state.train._replace(step=state.step * num_updates), {}
    nonfinite = jnp.zeros((), jnp.float32)
    for _ in range(num_updates):
        train, metrics = update(train, made)
        nonfinite = jnp.maximum(nonfinite, metrics["nonfinite"])
    return train, {**metrics, "nonfinite": nonfinite}


def _scaled(old: Params, new: Params, scale: Array) -> Params:
    return jax.tree.map(lambda x, y: jnp.where(scale == 1, y, x + scale * (y - x)), old, new)


def _mean(values: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def _reward_metrics(
    reward_BK: Array, advantage_BK: Array, tokens_BKL: Array, valid_BK: Array
) -> Metrics:
    count_BK = jnp.sum(tokens_BKL != PAD_ID, 2)
    is_cut_BK = tokens_BKL[:, :, -1] > EOS_ID
    return {
        "reward": _mean(reward_BK, valid_BK),
        "reward_std": _mean(jnp.std(reward_BK, 1), valid_BK[:, 0]),
        "advantage_scale": jnp.sqrt(_mean(jnp.square(advantage_BK), valid_BK)),
        "repetition": -_mean(repetition_penalty(tokens_BKL), valid_BK),
        "caption_tokens": _mean(count_BK.astype(jnp.float32), valid_BK),
        "unfinished": _mean(is_cut_BK.astype(jnp.float32), valid_BK),
    }


def _next_learner(
    learner: Learner, reward_BK: Array, valid_BK: Array, metrics: Metrics, policy: PolicyGradient
) -> Learner:
    """What the learner remembers; as it was, where the batch was skipped or its reward is none."""
    kl_weight = learner.kl_weight
    if policy.kl_target:
        kl_weight = next_kl_weight(kl_weight, metrics["kl"], policy.kl_target)
    after = learner._replace(
        reward_sum=learner.reward_sum + _mean(reward_BK, valid_BK),
        reward_count=learner.reward_count + 1,
        kl_weight=kl_weight,
    )
    is_sound = (metrics["nonfinite"] == 0) & jnp.isfinite(after.reward_sum + after.kl_weight)
    return jax.tree.map(lambda old, new: jnp.where(is_sound, new, old), learner, after)
