"""The optimizers, with clipping, weight decay, learning rates and freezing around them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from capjax.dims import Params
from capjax.errors import UserError
from capjax.training.adafactor import (
    average_in_bfloat16,
    clip_by_rms,
    scale_by_factored_rms,
    scale_by_parameter_rms,
)
from capjax.training.layout import Layout, each, layouts
from capjax.training.muon import scale_by_muon
from capjax.training.patterns import by_name, frozen_names
from capjax.training.rates import rate_factors
from capjax.training.schedule import Schedule, ScheduleConfig, learning_rate_schedule

MOMENT_DTYPES = ("float32", "bfloat16")

# The optimizers, with the fields that only some of them use.
OPTIMIZERS = {
    "adamw": {"b1", "b2", "eps", "first_moment_dtype", "second_moment_dtype"},
    "big_vision_adafactor": {"b1", "b2"},
    "adafactor": set(),
    "muon": {"b1", "b2", "eps", "momentum", "first_moment_dtype", "second_moment_dtype"},
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(ScheduleConfig):
    """An optimizer and its schedule.

    A field that the named optimizer does not use must be left at its default.

    Attributes:
      name: one of
        "adamw": as optax.adamw.
        "big_vision_adafactor": of big_vision's CapPa and SigLIP recipes. The second moment is
          factored where the two longest axes have 32 or more, and decays by at most `b2`; updates
          are averaged over time by `b1`, in bfloat16 and without correction for the start at 0.
        "adafactor": the original, as optax.adafactor: factored from 128 on, updates clipped to a
          root mean square of 1 and multiplied by the parameter's.
        "muon": orthogonalised momentum for kernels between the first layer and the last, adamw
          with the same learning rate for all else.
      weight_decay: falls on the parameters named `kernel` alone, and is decoupled: a step takes off
        learning_rate * weight_decay of each, times its factor of `layer_decay` and `multipliers`.
        Of "big_vision_adafactor" it is not multiplied by the peak learning rate nor by the
        factors, but by the schedule alone: its 1e-4 is a 0.1 elsewhere, at a rate of 1e-3.
      b1, b2, eps: of Adam.
      momentum: of Muon.
      grad_clip_norm: the largest global norm of the gradient, over what is trained; 0: not clipped.
      first_moment_dtype: "bfloat16" keeps it in half the memory (also Muon's momentum).
      second_moment_dtype: likewise; then `b2` must be 0.99 or less, because nearer to 1 a change
        is less than bfloat16 resolves, and the moment would never fall.
      ema_decay: of the average of the parameters over time; 0: there is none. See `update_ema`.
      layer_decay: from each block of the image encoder to the one before it the learning rate is
        multiplied by this; 1: all alike. See `rate_factors`.
      multipliers: (pattern, factor), …: factors on the learning rate of the parameters that a
        pattern matches, the first that does.
      freeze: patterns of parameters that are not trained; they have no optimizer state, and are
        left out of the norm that is clipped.

    A pattern is a regular expression for a whole name, or for what stands above it: "encoder",
    "decoder/blocks", ".*/bias".
    """

    name: str = "adamw"
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.95
    grad_clip_norm: float = 1.0
    first_moment_dtype: str = "float32"
    second_moment_dtype: str = "float32"
    ema_decay: float = 0.0
    layer_decay: float = 1.0
    multipliers: tuple[tuple[str, float], ...] = ()
    freeze: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        for name, choices in {
            "name": OPTIMIZERS,
            "first_moment_dtype": MOMENT_DTYPES,
            "second_moment_dtype": MOMENT_DTYPES,
        }.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"optimizer.{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )
        for name in ("b1", "b2", "momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)}: expected 0 <= {name} < 1")
        if not 0 < self.eps < math.inf:
            raise UserError(f"optimizer.eps={self.eps}: expected more than 0")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"optimizer.layer_decay={self.layer_decay}: expected 0 < it <= 1")
        for name in ("weight_decay", "grad_clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name}={getattr(self, name)}: expected 0 or more")
        for pattern, factor in self.multipliers:
            if not 0 < factor < math.inf:
                raise UserError(
                    f"optimizer.multipliers: {factor} for {pattern!r}: expected more than 0; "
                    "optimizer.freeze holds parameters fast"
                )
        if self.second_moment_dtype != "float32" and self.b2 > 0.99:
            raise UserError(
                f"optimizer.second_moment_dtype={self.second_moment_dtype!r} with optimizer.b2="
                f"{self.b2}: the moment would never fall; use b2=0.99 or less, or float32"
            )
        self._check_unused()

    def _check_unused(self):
        for field in dataclasses.fields(self):
            users = [name for name, used in OPTIMIZERS.items() if field.name in used]
            value = getattr(self, field.name)
            if users and self.name not in users and value != field.default:
                raise UserError(
                    f"optimizer.{field.name}={value!r} is not used by optimizer.name="
                    f"{self.name!r}, only by {', '.join(users)}; leave it at {field.default!r}"
                )


def make_optimizer(
    config: OptimizerConfig, total_steps: int, params: Params | None = None
) -> tuple[optax.GradientTransformationExtraArgs, Schedule]:
    """The optimizer of a nested dict of parameters, and the schedule that it follows.

    Its `update` takes the norm of the gradients as `gradient_norm` where that is known already; the
    gradients of what is frozen must then be 0.

    `params` are those of the model without what pads them (`PureModel.unpadded_params`): by their
    sizes a moment is factored or not, and a matrix's root mean square taken. Patterns that match
    nothing raise `UserError` here already.
    """
    schedule = learning_rate_schedule(config, total_steps)
    used = {name: x.shape for name, x in by_name(params or {}).items()}

    def parts(params: Params) -> tuple[optax.GradientTransformation, dict[str, Any]]:
        """What trains, of parameters (concrete or abstract), and those that it trains by name."""
        frozen = frozen_names(params, config.freeze)
        trained = {name: x for name, x in by_name(params).items() if name not in frozen}
        factors = rate_factors(params, config.layer_decay, config.multipliers)
        return _transformation(config, schedule, layouts(trained, used), factors), trained

    def init(params: Any):
        tx, trained = parts(params)
        return tx.init(trained)

    def update(updates: Any, state: Any, params: Any = None, **norm: Any):
        tx, trained = parts(params)
        gradients = by_name(updates)
        moved: Any = tx.update({name: gradients[name] for name in trained}, state, trained, **norm)
        # Not +0: x + -0 is x, also where x is -0.
        moves = [moved[0].get(name, jnp.full_like(x, -0.0)) for name, x in by_name(params).items()]
        return jax.tree.unflatten(jax.tree.structure(params), moves), moved[1]

    if params is not None:
        parts(params)
    return optax.GradientTransformationExtraArgs(init, update), schedule


def _transformation(
    config: OptimizerConfig,
    schedule: Schedule,
    layouts: dict[str, Layout],
    factors: dict[str, Any],
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a dict of arrays by name."""
    decay = optax.add_decayed_weights(config.weight_decay, mask=is_decayed)
    scale = each(lambda name, update, _: update * factors[name])
    steps = [_direction(config, layouts)]
    if config.name == "big_vision_adafactor":
        peak = config.learning_rate
        steps += [scale, optax.scale(peak), decay]
        steps += [optax.scale_by_learning_rate(lambda step: schedule(step) / peak)]
    else:
        steps += [decay, scale, optax.scale_by_learning_rate(schedule)]
    if config.grad_clip_norm:
        steps.insert(0, _clip_by_global_norm(config.grad_clip_norm))
    return optax.chain(*steps)


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """As optax's, but with one factor for all, which fuses into what reads the gradients."""

    def update(updates: Any, state: Any, params: Any = None, *, gradient_norm: Any = None, **_):
        norm = optax.tree.norm(updates) if gradient_norm is None else gradient_norm
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _direction(config: OptimizerConfig, layouts: dict[str, Layout]) -> optax.GradientTransformation:
    """What the optimizer makes of a gradient, before the learning rate."""
    if config.name == "big_vision_adafactor":
        return optax.chain(
            scale_by_factored_rms(layouts, min_size=32, max_decay=config.b2),
            average_in_bfloat16(config.b1),
        )
    if config.name == "adafactor":
        return optax.chain(
            scale_by_factored_rms(layouts, min_size=128),
            clip_by_rms(layouts, 1.0),
            scale_by_parameter_rms(layouts),
        )
    adam = _scale_by_adam(config)
    if config.name == "muon":
        dtype = config.first_moment_dtype
        return scale_by_muon(layouts, adam, momentum=config.momentum, momentum_dtype=dtype)
    return adam


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.first_moment_dtype)
    if config.second_moment_dtype == "float32":
        return adam

    def init(params: Any):
        return rounded(adam.init(params))

    def rounded(state: Any):
        return state._replace(nu=optax.tree.cast(state.nu, config.second_moment_dtype))

    def update(updates: Any, state: Any, params: Any = None):
        # Widened first: optax would do the sum in bfloat16.
        state = state._replace(nu=optax.tree.cast(state.nu, jnp.float32))
        updates, state = adam.update(updates, state, params)
        return updates, rounded(state)

    return optax.GradientTransformation(init, update)


def is_decayed(params: dict[str, Any]) -> dict[str, bool]:
    """Of each name, whether weight decay applies: to those whose last part is `kernel`."""
    return {name: name.rsplit("/", 1)[-1] == "kernel" for name in params}
