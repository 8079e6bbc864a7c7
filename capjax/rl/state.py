"""The state of a reinforcement run: a training state, and what its learner remembers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from capjax.dims import Array, Float, Int, Params, PRNGKeyArray
from capjax.mesh import reshard
from capjax.rl.rollout import Rollout
from capjax.training.state import TrainState


class Learner(NamedTuple):
    """What continues from batch to batch beside the parameters.

    `reward_sum` and `reward_count` are those of the batches' mean rewards: their quotient is the
    running baseline. `rate_scale` multiplies every update; an alarm may lower it.
    """

    reward_sum: Float[Array, ""]
    reward_count: Float[Array, ""]
    kl_weight: Float[Array, ""]
    rate_scale: Float[Array, ""]

    @property
    def running_mean(self) -> Float[Array, ""]:
        """The arithmetic mean of the batches' rewards so far; 0 before the first."""
        return self.reward_sum / jnp.maximum(self.reward_count, 1)


class ReinforceState(NamedTuple):
    """`TrainState`, whose fields come first and mean the same, with the learner's own.

    `ahead` are captions of the next batch, sampled before the update of this one, where rewards of
    the host are computed meanwhile: they are in the checkpoint, because the parameters that they
    were sampled with are not.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    key: PRNGKeyArray
    ema: Params | None
    learner: Learner
    ahead: Rollout | None = None

    @property
    def train(self) -> TrainState:
        """The part that an update changes."""
        return TrainState(self.step, self.params, self.opt_state, self.key, self.ema)


def reinforce_state(
    state: TrainState, kl_weight: float, ahead: Rollout | None = None
) -> ReinforceState:
    """The state before the first step. Call under `jax.jit`, within `jax.set_mesh`."""
    numbers = (0.0, 0.0, kl_weight, 1.0)
    learner = Learner(*(jnp.float32(number) for number in numbers))
    made = ReinforceState(*state, learner=learner, ahead=ahead)
    return jax.tree.map(lambda x: reshard(x, jax.typeof(x).sharding.spec), made)
