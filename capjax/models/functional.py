"""The one place where modules and parameters part: a pure nested dict outside, modules inside."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from capjax.dims import Params


def split(module: nnx.Module) -> Params:
    """The parameters of a module as a nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def merge(build: Callable[[], Any], params: Params) -> Any:
    """The module that `build` would make, with `params` in it. Costs nothing inside jit."""
    return nnx.merge(_abstract(build)[0], params)


def abstract_params(build: Callable[[], Any]) -> Params:
    """Shape and type of every parameter that `build` would make."""
    return nnx.to_pure_dict(_abstract(build)[1])


def param_specs(build: Callable[[], Any]) -> Params:
    """For every parameter its `PartitionSpec`; a stack's layer axis is not split."""
    _, state = _abstract(build)

    def spec(variable: nnx.Variable) -> P:
        names = variable.get_metadata("spec")
        return P(*(None,) * (len(variable.get_value().shape) - len(names)), *names)

    return nnx.to_pure_dict(jax.tree.map(spec, state, is_leaf=lambda x: isinstance(x, nnx.Param)))


@functools.lru_cache(maxsize=64)
def _abstract(build: Callable[[], Any]) -> tuple:
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return nnx.split(jax.eval_shape(build))
