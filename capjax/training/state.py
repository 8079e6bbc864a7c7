"""The state of a run: all that a step reads and writes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from capjax.dims import Array, Int, Params, PRNGKeyArray
from capjax.mesh import reshard


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
    """The state before the first step. Call under `jax.jit`, within `jax.set_mesh`.

    `init_params` lays the parameters out on the mesh. The optimizer's moments are made from the
    parameters' types, which carry the sharding, so each moment is split as its parameter is.
    `jax.eval_shape` of this gives the abstract state to restore into, every leaf with its sharding.
    """
    params_key, train_key = jax.random.split(jax.random.key(seed))
    params = init_params(params_key)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), train_key)
    # What is made of nothing, like the counts, has no mesh in its type until it is put on one.
    return jax.tree.map(lambda x: reshard(x, jax.typeof(x).sharding.spec), state)
