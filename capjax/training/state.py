"""The state of a run: all that a step reads and writes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from capjax.dims import Array, Int, Params, PRNGKeyArray


class TrainState(NamedTuple):
    """`step` counts the batches consumed; `key` never changes, a step folds its number into it."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    key: PRNGKeyArray


def init_state(
    init_params: Callable[[PRNGKeyArray], Params],
    tx: optax.GradientTransformation,
    seed: int | Int[Array, ""],
) -> TrainState:
    """The state before the first step. Call under `jit_init`, within `jax.set_mesh`.

    `init_params` lays the parameters out on the mesh. The optimizer's moments are made from the
    parameters' types, which carry the sharding, so each moment is split as its parameter is.
    `jax.eval_shape` of this gives the abstract state to restore into; its leaves name their
    shardings, except the scalars `step` and optimizer counts, which are replicated.
    """
    params_key, train_key = jax.random.split(jax.random.key(seed))
    params = init_params(params_key)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), train_key)


def jit_init(init: Callable[[], TrainState]) -> Callable[[], TrainState]:
    """`jax.jit` for a program that runs once.

    Drawing many random arrays makes a program that is long to compile and quick to run, so on the
    CPU it is optimized less: compiled in a third of the time, to the same numbers bit for bit.
    """
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(init, compiler_options=options)
