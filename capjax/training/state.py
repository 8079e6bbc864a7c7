"""The state of a run: all that a step reads and writes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from capjax.dims import Array, Int, Params, PRNGKeyArray
from capjax.mesh import reshard


class TrainState(NamedTuple):
    """`step` counts the batches consumed; `key` never changes, a step folds its number into it.

    `ema` is the average of the parameters over time, None where none is kept.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    key: PRNGKeyArray
    ema: Params | None = None


def init_state(
    init_params: Callable[[PRNGKeyArray], Params],
    tx: optax.GradientTransformation,
    seed: int | Int[Array, ""],
    *,
    ema: bool = False,
) -> TrainState:
    """The state before the first step. Call under `jax.jit`, within `jax.set_mesh`.

    `init_params` lays the parameters out on the mesh. The optimizer's moments are made from the
    parameters' types, which carry the sharding, so each moment is split as its parameter is.
    `jax.eval_shape` of this gives the abstract state to restore into, every leaf with its sharding.
    With `ema` the average starts as the parameters.
    """
    params_key, train_key = jax.random.split(jax.random.key(seed))
    params = init_params(params_key)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), train_key)
    if ema:
        state = with_params(state._replace(ema=params), params)
    # What is made of nothing, like the counts, has no mesh in its type until it is put on one.
    return jax.tree.map(lambda x: reshard(x, jax.typeof(x).sharding.spec), state)


def with_params(state: TrainState, params: Params) -> TrainState:
    """`state` with other parameters, from which its average, if it keeps one, starts afresh."""
    # A copy, because a step donates both.
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state._replace(params=params, ema=ema)


def update_ema(ema: Params, params: Params, decay: float, step: int | Int[Array, ""]) -> Params:
    """The average after one more step: ema + (1 - d) (params - ema), d = min(decay, (1+t)/(10+t)).

    `t` is `step`, the number of batches before this one. The smaller decay at first, as in
    TensorFlow's ExponentialMovingAverage, lets the average forget where it started.
    """
    step = jnp.asarray(step, jnp.float32)
    weight = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    # In this form what is equal stays equal, bit for bit: the average of a frozen parameter.
    return jax.tree.map(lambda average, new: average + weight * (new - average), ema, params)
