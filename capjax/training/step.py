"""One training step: gradients, update, metrics, in one compiled program."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from capjax.dims import Array, Batch, Metrics, Params, PRNGKeyArray
from capjax.errors import UserError
from capjax.mesh import BATCH, out_sharding
from capjax.objectives.metrics import reduce_metrics
from capjax.objectives.objective import Loss
from capjax.training.patterns import stop_gradients
from capjax.training.state import TrainState, update_ema


def make_train_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    learning_rate: Callable | None = None,
    accumulation_steps: int = 1,
    freeze: Sequence[str] = (),
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step (state, batch) -> (state, metrics). The old state's buffers are donated.

    The metrics are those of `loss` as scalars on the device, with `loss`, `grad_norm` (before
    clipping), `param_norm` (before the update), `nonfinite` and, where the schedule
    `learning_rate` is given, its value in this step.

    A loss, gradient or parameter that is not finite makes `nonfinite` 1 and leaves parameters and
    optimizer state as they were; only `step` advances. So a state is never poisoned, even where the
    metrics are read a step late. With `accumulation_steps` the batch is walked through in that many
    microbatches, and the gradient is that of the whole batch. Where rows meet (`loss.across`) they
    are walked through twice: for the embeddings, whose gradient is then known for the whole batch,
    and for the parameters' gradient, into which that goes (GradCache, Gao et al. 2021).

    Parameters that a pattern of `freeze` matches take no part in the backward pass; `tx` must leave
    them alone. A state that keeps an average of the parameters has it updated with `ema_decay`.
    """

    if freeze:
        loss = loss.on(lambda params: stop_gradients(params, freeze))
    optimizer = optax.with_extra_args_support(tx)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        value, metrics, grads = _gradients(loss, state.params, batch, key, accumulation_steps)
        grad_norm = optax.tree.norm(grads)
        param_norm = optax.tree.norm(state.params)
        # Were the branch not to wait for the parameters' norm, it would update a copy of them.
        is_finite = jnp.isfinite(value) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)

        def updated(params, opt_state, ema):
            updates, opt_state = optimizer.update(grads, opt_state, params, gradient_norm=grad_norm)
            params: Any = optax.apply_updates(params, updates)
            if ema is not None:
                ema = update_ema(ema, params, ema_decay, state.step)
            return params, opt_state, ema

        # A branch: a selection by element would hold the old state and the new at once.
        params, opt_state, ema = lax.cond(
            is_finite, updated, lambda *old: old, state.params, state.opt_state, state.ema
        )
        metrics = metrics | {
            "loss": value,
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "nonfinite": 1 - is_finite.astype(jnp.float32),
        }
        if learning_rate is not None:
            metrics["learning_rate"] = jnp.asarray(learning_rate(state.step), jnp.float32)
        return TrainState(state.step + 1, params, opt_state, state.key, ema), metrics

    return jax.jit(train_step, donate_argnums=0)


def _gradients(loss: Loss, params: Params, batch: Batch, key: PRNGKeyArray, steps: int):
    """(loss, metrics, gradients) of the whole batch, in `steps` microbatches."""
    batch = loss.prepared(batch, key)
    if steps == 1:
        whole = jax.value_and_grad(loss.whole, has_aux=True)
        (value, metrics), grads = whole(params, batch, key)
        return value, reduce_metrics(metrics), grads
    together = loss.rows_together
    microbatches = {name: _cut(name, x, steps, together) for name, x in batch.items()}

    def microbatch(i):
        return {name: _take(x, i) for name, x in microbatches.items()}

    # The same key for all: an example's randomness comes from its position, not its batch.
    def rows(params, i):
        return loss.rows(params, microbatch(i), key)

    across, across_metrics, across_grads = jnp.zeros(()), {}, jax.tree.map(jnp.zeros_like, params)
    slopes = ()
    if loss.across is not None:
        _, embeddings = lax.scan(lambda _, i: (None, rows(params, i)[2]), None, jnp.arange(steps))
        embeddings = jax.tree.map(lambda x: _join(x, together), embeddings)
        of_both = jax.value_and_grad(loss.across, argnums=(0, 1), has_aux=True)
        (across, across_metrics), (across_grads, slopes) = of_both(params, embeddings)
        slopes = jax.tree.map(lambda x: _cut("embeddings", x, steps, together), slopes)

    def microbatch_loss(params, i):
        value, metrics, embeddings = rows(params, i)
        # Its gradient is the embeddings' part; the microbatches' gradients are averaged below.
        parts = jax.tree.map(
            lambda x, slope: jnp.sum(x * _take(slope, i), dtype=jnp.float32), embeddings, slopes
        )
        through_embeddings = steps * sum(jax.tree.leaves(parts))
        return value + through_embeddings, (value, metrics)

    def accumulate(sums, i):
        grads, (value, metrics) = jax.grad(microbatch_loss, has_aux=True)(params, i)
        return jax.tree.map(jnp.add, sums, grads), (value, metrics)

    zeros = jax.tree.map(jnp.zeros_like, params)
    sums, (values, metrics) = lax.scan(accumulate, zeros, jnp.arange(steps))
    grads = jax.tree.map(lambda x, y: x / steps + y, sums, across_grads)
    metrics = reduce_metrics(metrics) | reduce_metrics(across_metrics)
    return jnp.mean(values) + across, metrics, grads


def _cut(name: str, x: Array, steps: int, together: int) -> Array:
    """[B, ...] as [B / steps / together, steps, together, ...]: every device keeps its rows."""
    B = x.shape[0]
    if B % (steps * together):
        unit = steps * together
        raise UserError(
            f"accumulation_steps={steps} does not divide the batch of {B} rows ({name}) in groups "
            f"of {together}; use a multiple of {unit} rows"
        )
    return _reshape(x, (B // steps // together, steps, together, *x.shape[1:]), 0)


def _take(x: Array, i: Array) -> Array:
    """Microbatch i of what `_cut` made: [B / steps, ...]."""
    return _reshape(x[:, i], (x.shape[0] * x.shape[2], *x.shape[3:]), 0)


def _join(x: Array, together: int) -> Array:
    """[steps, B / steps, ...] of all microbatches as [B, ...], in the order before the cut."""
    steps, rows = x.shape[:2]
    x = _reshape(x, (steps, rows // together, together, *x.shape[2:]), 1)
    return _reshape(jnp.swapaxes(x, 0, 1), (steps * rows, *x.shape[3:]), 0)


def _reshape(x: Array, shape: tuple[int, ...], batch_axis: int) -> Array:
    spec = P(*(None,) * batch_axis, BATCH, *(None,) * (len(shape) - batch_axis - 1))
    return jnp.reshape(x, shape, out_sharding=out_sharding(spec))
