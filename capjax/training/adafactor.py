"""Adafactor: second moments in factored form, in big_vision's variant and in the original one.

Sources: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (2018);
Zhai et al., "Scaling Vision Transformers" (2022), whose variant is big_vision's
`scale_by_adafactor`; for the arithmetic optax's `scale_by_factored_rms` and `adafactor`. Every
transformation here works on a dict of arrays by name, and on each matrix by itself (`Layout`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from capjax.dims import Array, Int
from capjax.training.layout import Layout, each

EPSILON = 1e-30  # of a squared gradient


class FactoredState(NamedTuple):
    """Second moments by name: means over one of two axes each (size 1 there), or in full."""

    count: Int[Array, ""]
    row: dict[str, Array]  # mean over the largest axis
    column: dict[str, Array]  # mean over the second largest
    full: dict[str, Array]


class AverageState(NamedTuple):
    """The mean of updates over time, by name."""

    mu: dict[str, Array]


def scale_by_factored_rms(
    layouts: Mapping[str, Layout], *, min_size: int, max_decay: float = 1.0
) -> optax.GradientTransformation:
    """Divides a gradient by the root of its second moment, factored over the two largest axes.

    In step i = 0, 1, … the moment decays by min(max_decay, 1 - (i + 1)**-0.8). Where a matrix's
    second largest axis is shorter than `min_size` the moment is kept in full.
    """
    axes = {name: layout.largest_axes(min_size) for name, layout in layouts.items()}

    def init(params: Any) -> FactoredState:
        state = FactoredState(jnp.zeros((), jnp.int32), {}, {}, {})
        for name, x in params.items():
            match axes[name]:
                case None:
                    state.full[name] = jnp.zeros_like(x)
                case second, first:
                    # Of a sum, whose type says how the axes that are left are split.
                    state.row[name] = jnp.zeros_like(jnp.sum(x, first, keepdims=True))
                    state.column[name] = jnp.zeros_like(jnp.sum(x, second, keepdims=True))
        return state

    def update(updates: Any, state: Any, params: Any = None):
        del params
        decay = jnp.minimum(max_decay, 1 - (state.count + 1).astype(jnp.float32) ** -0.8)

        def average(old: Array, new: Array) -> Array:
            return decay * old + (1 - decay) * (new + EPSILON)

        moments, scaled = FactoredState(state.count + 1, {}, {}, {}), {}
        for name, gradient in updates.items():
            square, layout = jnp.square(gradient), layouts[name]
            match axes[name]:
                case None:
                    moments.full[name] = average(state.full[name], square)
                    scaled[name] = gradient * lax.rsqrt(moments.full[name])
                case second, first:
                    row = average(state.row[name], layout.mean(square, first))
                    column = average(state.column[name], layout.mean(square, second))
                    moments.row[name], moments.column[name] = row, column
                    row = row / layout.mean(row, second)
                    scaled[name] = gradient * lax.rsqrt(row) * lax.rsqrt(column)
        return scaled, moments

    return optax.GradientTransformation(init, update)


def average_in_bfloat16(decay: float) -> optax.GradientTransformation:
    """The mean of updates over time, kept in bfloat16, not corrected for its start at zero.

    As in optax.ema the sum is 1 - decay of the update and the product of moment and decay, itself
    a product in bfloat16: a decay of 0.9 acts as 0.8984375. XLA leaves out the rounding of what it
    fuses, so that it is asked for.
    """
    rounded_decay = float(np.array(decay, jnp.bfloat16))

    def update(updates: Any, state: Any, params: Any = None):
        del params

        def average(update: Array, moment: Array) -> Array:
            kept = lax.reduce_precision(moment.astype(jnp.float32) * rounded_decay, 8, 7)
            return (1 - decay) * update + kept

        averages = jax.tree.map(average, updates, state.mu)
        return averages, AverageState({n: x.astype(jnp.bfloat16) for n, x in averages.items()})

    return optax.GradientTransformation(
        lambda params: AverageState(optax.tree.zeros_like(params, dtype=jnp.bfloat16)), update
    )


def clip_by_rms(layouts: Mapping[str, Layout], limit: float) -> optax.GradientTransformation:
    """Scales each matrix's update down to the root mean square `limit`."""
    return each(lambda name, u, _: u / jnp.maximum(1, layouts[name].rms(u) / limit))


def scale_by_parameter_rms(
    layouts: Mapping[str, Layout], minimum: float = 1e-3
) -> optax.GradientTransformation:
    """Multiplies each matrix's update by the root mean square of the matrix, at least `minimum`."""
    return each(lambda name, u, param: u * jnp.maximum(layouts[name].rms(param), minimum))
