"""Learning-rate schedules, and durations given in steps, examples or epochs."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from capjax.errors import UserError

UNITS = ("steps", "examples", "epochs")
SCHEDULES = ("cosine", "rsqrt", "constant")

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate goes over a run; see `learning_rate_schedule`.

    Attributes:
      learning_rate: the peak.
      schedule: "cosine" (to 0), "rsqrt" or "constant".
      warmup_steps, cooldown_steps: linear from 0 at the start, linear to 0 at the end.
      timescale: steps after which "rsqrt" has fallen to 1 / sqrt(2).
    """

    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    cooldown_steps: int = 0
    timescale: float = 10_000.0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"optimizer.schedule={self.schedule!r}: choose one of {', '.join(SCHEDULES)}"
            )
        for name in ("learning_rate", "timescale"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name}={getattr(self, name)}: expected more than 0")
        for name in ("warmup_steps", "cooldown_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name}={getattr(self, name)}: expected 0 or more")


def duration(
    name: str,
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    num_examples: int | None = None,
    default: int | None = None,
) -> int:
    """Steps from whichever of `{name}_steps`, `{name}_examples`, `{name}_epochs` is given.

    Examples and epochs are rounded up to whole batches of `batch_size`; an epoch is `num_examples`
    examples. A key that is absent or None is not given; with none given the result is `default`.
    Raises `UserError` where two are given, or none without a default, or the value does not do.
    """
    keys = [f"{name}_{unit}" for unit in UNITS]
    given = {key: settings[key] for key in keys if settings.get(key) is not None}
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are both set: give one, and None for the others")
    if not given:
        if default is not None:
            return default
        raise UserError(f"no {name} duration: give one of {', '.join(keys)}")
    ((key, value),) = given.items()
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise UserError(f"{key}={value!r}: expected a number, 0 or more")
    if key == keys[0]:
        if value != int(value):
            raise UserError(f"{key}={value!r}: expected a whole number of steps")
        return int(value)
    examples = value
    if key == keys[2]:
        if not num_examples:
            raise UserError(f"{key}={value!r}: the source has no length; give {keys[0]} instead")
        examples = value * num_examples
    return math.ceil(round(examples / batch_size, 6))  # 0.1 * 30 is a little more than 3


def learning_rate_schedule(config: ScheduleConfig, total_steps: int) -> Schedule:
    """step -> learning rate, float32, with w = `warmup_steps`, c = `cooldown_steps`:

        learning_rate * min(1, step / w) * min(1, (total_steps - step) / c) * decay(step)

        cosine    (1 + cos(pi * clip((step - w) / (total_steps - w), 0, 1))) / 2
        rsqrt     1 / sqrt(1 + max(step - w, 0) / timescale)
        constant  1

    A factor with w = 0 or c = 0 is left out. With a warm-up the rate of step 0 is 0. Source:
    big_vision's `create_learning_rate_schedule`. Raises `UserError` where the parts do not fit.
    """
    warmup, cooldown = config.warmup_steps, config.cooldown_steps
    if total_steps < 1:
        raise UserError(f"total_steps={total_steps}: expected at least 1")
    if warmup + cooldown > total_steps:
        raise UserError(
            f"optimizer.warmup_steps={warmup} + optimizer.cooldown_steps={cooldown} is more than "
            f"total_steps={total_steps}: shorten them, or train longer"
        )

    def schedule(step):
        after_warmup = jnp.maximum(jnp.asarray(step, jnp.float32) - warmup, 0)
        rate = jnp.float32(config.learning_rate)
        if config.schedule == "cosine":
            progress = jnp.minimum(after_warmup / max(total_steps - warmup, 1), 1)
            rate *= 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "rsqrt":
            rate *= 1 / jnp.sqrt(1 + after_warmup / config.timescale)
        if warmup:
            rate *= jnp.minimum(1, step / warmup)
        if cooldown:
            rate *= jnp.clip((total_steps - step) / cooldown, 0, 1)
        return rate

    return schedule
