"""One training step: gradients, update, metrics, in one compiled program."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from capjax.dims import Array, Batch, Float, Metrics, Params, PRNGKeyArray
from capjax.errors import UserError
from capjax.mesh import BATCH, out_sharding
from capjax.objectives.metrics import reduce_metrics
from capjax.training.state import TrainState

LossFn = Callable[[Params, Batch, PRNGKeyArray], tuple[Float[Array, ""], Metrics]]


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    learning_rate: Callable | None = None,
    accumulation_steps: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step (state, batch) -> (state, metrics). The old state's buffers are donated.

    The metrics are those of `loss_fn` as scalars on the device, with `loss`, `grad_norm` (before
    clipping), `param_norm` (before the update), `nonfinite` and, where the schedule
    `learning_rate` is given, its value in this step.

    A loss or gradient that is not finite makes `nonfinite` 1 and leaves parameters and optimizer
    state as they were; only `step` advances. So a state is never poisoned, even where the metrics
    are read a step late. With `accumulation_steps` the gradient is the mean over that many
    microbatches, which is the gradient of the whole batch for a loss that is a mean over rows.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        loss, metrics, grads = _gradients(loss_fn, state.params, batch, key, accumulation_steps)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        metrics = metrics | {
            "loss": loss,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(state.params),
            "nonfinite": 1 - is_finite.astype(jnp.float32),
        }
        if learning_rate is not None:
            metrics["learning_rate"] = jnp.asarray(learning_rate(state.step), jnp.float32)
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return jax.jit(train_step, donate_argnums=0)


def _gradients(loss_fn: LossFn, params: Params, batch: Batch, key: PRNGKeyArray, steps: int):
    """(loss, metrics, gradients), means over `steps` microbatches."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if steps == 1:
        (loss, metrics), grads = value_and_grad(params, batch, key)
        return loss, reduce_metrics(metrics), grads
    microbatches = {name: _split(name, x, steps) for name, x in batch.items()}

    def accumulate(sums, i):
        rows = {name: x[:, i] for name, x in microbatches.items()}
        # The same key for all: an example's randomness comes from its position, not its batch.
        (loss, metrics), grads = value_and_grad(params, rows, key)
        return jax.tree.map(jnp.add, sums, grads), (loss, metrics)

    zeros = jax.tree.map(jnp.zeros_like, params)
    sums, (losses, metrics) = lax.scan(accumulate, zeros, jnp.arange(steps))
    grads = jax.tree.map(lambda x: x / steps, sums)
    return jnp.mean(losses), reduce_metrics(metrics), grads


def _split(name: str, x: Array, steps: int) -> Array:
    """[B, ...] as [B / steps, steps, ...]: every device keeps its rows, in each microbatch."""
    B = x.shape[0]
    if B % steps:
        raise UserError(
            f"accumulation_steps={steps} does not divide the batch of {B} rows; "
            f"use a batch size of {B // steps * steps or steps} or {(B // steps + 1) * steps}"
        )
    spec = P(BATCH, *(None,) * x.ndim)
    return jnp.reshape(x, (B // steps, steps, *x.shape[1:]), out_sharding=out_sharding(spec))
