"""The one place where modules and parameters part: a pure nested dict outside, modules inside."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from capjax.dims import Array, Params, PRNGKeyArray

Build = Callable[[], nnx.Module]  # makes a module of declared parameters


def merge(build: Build, params: Params) -> Any:
    """The module that `build` makes, with `params` (of NumPy too) in it; free inside jit."""
    return nnx.merge(_split(build)[0], jax.tree.map(jnp.asarray, params))


def init(build: Build, key: PRNGKeyArray) -> Params:
    """Every parameter drawn by its law, laid out on the mesh if one is set."""
    declared, treedef = jax.tree.flatten(_split(build)[1], is_leaf=_is_param)
    keys = jax.random.split(key, len(declared))

    def draw(param: nnx.Param, key: PRNGKeyArray) -> Array:
        return param.get_metadata("law").draw(key, _value(param).shape, _spec(param))

    drawn = [draw(param, key) for param, key in zip(declared, keys, strict=True)]
    return nnx.to_pure_dict(jax.tree.unflatten(treedef, drawn))


def abstract_params(build: Build) -> Params:
    """Shape and type of every parameter."""
    return nnx.to_pure_dict(jax.tree.map(_value, _split(build)[1], is_leaf=_is_param))


def param_specs(build: Build) -> Params:
    """For every parameter its `PartitionSpec`."""
    return nnx.to_pure_dict(jax.tree.map(_spec, _split(build)[1], is_leaf=_is_param))


@functools.lru_cache(maxsize=64)
def _split(build: Build) -> tuple:
    return nnx.split(build())


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Param)


def _value(param: nnx.Param) -> jax.ShapeDtypeStruct:
    return param.get_value()


def _spec(param: nnx.Param) -> P:
    """As declared; the layer axis that a stack puts in front is not split."""
    spec = param.get_metadata("spec")
    return P(*(None,) * (len(_value(param).shape) - len(spec)), *spec)
