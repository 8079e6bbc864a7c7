"""The one place where modules and parameters part: a pure nested dict outside, modules inside."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from capjax.dims import Array, Params, PRNGKeyArray
from capjax.mesh import check_divides

Build = Callable[[], nnx.Module]  # makes a module of declared parameters


@dataclasses.dataclass(frozen=True)
class PureModel:
    """A model of one configuration, whose methods are pure functions of a nested dict of arrays.

    It reads only the entries of the dict that are its own. So models that share towers share one
    dict: a captioner and two towers both find their image encoder in `params["encoder"]`.
    """

    config: Hashable
    module_class: ClassVar[type] = nnx.Module  # made with the configuration as its one argument

    @functools.partial(jax.jit, static_argnums=0)
    def _init(self, key):
        return init(self._build, key)

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters, laid out on the mesh if one is set (the same numbers on any mesh).

        Raises `UserError` where a size does not divide over its mesh axis.
        """
        check_divides(self.abstract_params(), self.param_specs())
        return self._init(key)

    def abstract_params(self) -> Params:
        """Shape and type of every parameter."""
        return abstract_params(self._build)

    def unpadded_params(self) -> Params:
        """The same, of the part of each that is in use: without the padding of vocabularies."""
        return unpadded_params(self._build)

    def param_specs(self) -> Params:
        """The `PartitionSpec` of every parameter."""
        return param_specs(self._build)

    def num_params(self) -> int:
        """Parameters, without the padding of vocabularies."""
        return sum(x.size for x in jax.tree.leaves(self.unpadded_params()))

    def module(self, params: Params) -> Any:
        """The module with its own entries of `params` in it."""
        return merge(self._build, {name: params[name] for name in self.abstract_params()})

    @property
    def _build(self) -> Build:
        return _builder(self.module_class, self.config)


@functools.lru_cache(maxsize=256)
def _builder(module_class: type, config: Hashable) -> Build:
    """A builder without arguments, the same object for the same configuration (it keys a cache)."""
    return functools.partial(module_class, config)


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


@functools.lru_cache(maxsize=256)
def abstract_params(build: Build) -> Params:
    """Shape and type of every parameter."""
    return nnx.to_pure_dict(jax.tree.map(_value, _split(build)[1], is_leaf=_is_param))


@functools.lru_cache(maxsize=256)
def unpadded_params(build: Build) -> Params:
    """Shape and type of the part in use of every parameter."""
    return nnx.to_pure_dict(jax.tree.map(_used, _split(build)[1], is_leaf=_is_param))


def param_specs(build: Build) -> Params:
    """For every parameter its `PartitionSpec`."""
    return nnx.to_pure_dict(jax.tree.map(_spec, _split(build)[1], is_leaf=_is_param))


@functools.lru_cache(maxsize=256)
def _split(build: Build) -> tuple:
    return nnx.split(build())


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Param)


def _value(param: nnx.Param) -> jax.ShapeDtypeStruct:
    return param.get_value()


def _used(param: nnx.Param) -> jax.ShapeDtypeStruct:
    value, used = _value(param), param.get_metadata("used")
    layers = value.shape[: len(value.shape) - len(used)]
    return jax.ShapeDtypeStruct((*layers, *used), value.dtype)


def _spec(param: nnx.Param) -> P:
    """As declared; the layer axis that a stack puts in front is not split."""
    spec = param.get_metadata("spec")
    return P(*(None,) * (len(_value(param).shape) - len(spec)), *spec)
