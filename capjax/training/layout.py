"""Which axes of a stored parameter only number its matrices.

A stack of blocks is stored as one array with a leading layer axis, and query, key and value side by
side. Whatever an optimizer does to a matrix as a whole (factored moments, orthogonalisation, the
norm of an update) it must do to each layer and to each projection by itself.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from capjax.dims import Array, Params
from capjax.training.patterns import by_name

FUSED = ("qkv", "key_value")  # projections side by side on the axis before the last


class Layout(NamedTuple):
    """Of one stored parameter: the axes of its matrices, and the size in use of every axis."""

    axes: tuple[int, ...]
    sizes: tuple[int, ...]

    def mean(self, x: Array, axis: int) -> Array:
        """Mean over one axis, kept; what pads the axis must be zero and does not count."""
        return jnp.sum(x, axis, keepdims=True) / self.sizes[axis]

    def rms(self, x: Array) -> Array:
        """Root mean square of each matrix, its axes kept; padding must be zero."""
        size = math.prod(self.sizes[axis] for axis in self.axes)
        return jnp.sqrt(jnp.sum(jnp.square(x), self.axes, keepdims=True) / size)

    def largest_axes(self, min_size: int) -> tuple[int, int] | None:
        """The second largest and the largest axis; None where the second is below `min_size`.

        Of equal axes the later counts as larger, as in optax's and big_vision's Adafactor.
        """
        if len(self.axes) < 2:
            return None
        order = np.argsort([self.sizes[axis] for axis in self.axes], kind="stable")
        second, first = self.axes[order[-2]], self.axes[order[-1]]
        return (second, first) if self.sizes[second] >= min_size else None


def layouts(params: Params, used: Mapping[str, tuple[int, ...]]) -> dict[str, Layout]:
    """By name; `used` has the shape without padding of the parameters that have any."""
    return {name: _layout(name, used.get(name, x.shape)) for name, x in by_name(params).items()}


def each(function: Callable[[str, Array, Array], Array]) -> optax.GradientTransformation:
    """(name, update, parameter) -> update as a transformation of a dict of arrays by name."""

    def update(updates: Any, state: Any, params: Any = None):
        return {name: function(name, u, params[name]) for name, u in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _layout(name: str, sizes: tuple[int, ...]) -> Layout:
    parents = name.split("/")[:-1]
    axes = list(range(len(sizes)))
    if parents and parents[-1] in FUSED:
        del axes[-2]
    if any(parent.endswith("blocks") for parent in parents):
        del axes[0]
    return Layout(tuple(axes), sizes)
