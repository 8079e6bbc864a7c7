"""A linear classifier on frozen features: multinomial logistic regression, by L-BFGS on device.

    minimise  mean over rows of -log softmax(x W + b)[y]  +  penalty / 2 * |W|^2

for standardised features x; the bias b is free. The penalty is chosen on a part of the training
rows that is held out, and the classifier then fitted to all of them: the test rows take no part.
Letters: N rows, D features, C classes.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from capjax.decoding.inputs import pad_rows
from capjax.dims import Array, Bool, Float, Int
from capjax.errors import UserError
from capjax.evaluation.every_row import place
from capjax.mesh import BATCH, num_batch_shards, replicated

PENALTIES = tuple(10.0 ** (power / 2) for power in range(2, -13, -1))  # 10 to 1e-6, strong first
_TOLERANCE = 1e-6  # of the gradient's norm


class LinearProbe(NamedTuple):
    """Class scores of features are ((x - mean) / std) @ kernel + bias.

    penalty: the chosen one; held_out_top1: of every penalty tried, on the rows held out.
    """

    kernel_DC: np.ndarray
    bias_C: np.ndarray
    mean_D: np.ndarray
    std_D: np.ndarray
    penalty: float
    held_out_top1: dict[float, float]

    def scores(self, features_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N C"]:
        """The logits of the classes."""
        return (features_ND - self.mean_D) / self.std_D @ self.kernel_DC + self.bias_C


def train_linear_probe(
    features_ND: Float[np.ndarray, "N D"],
    labels_N: Int[np.ndarray, " N"],
    num_classes: int,
    *,
    mesh: Mesh,
    units: Sequence[str],
    penalties: Sequence[float] = PENALTIES,
    held_out: float = 0.2,
    max_steps: int = 200,
) -> LinearProbe:
    """Trains on N rows; takes about N (D + 3 C) floats, split over the mesh.

    Args:
      units: what each row shows. Rows of the same unit, such as two drawings of one thing, are held
        out together or not at all; or else little regularisation would look best.
      penalties: tried from the strongest on, each from the solution before it. Of equally good ones
        the strongest is taken.
      held_out: about this share of the units is held out; a hash of the unit decides.
      max_steps: of L-BFGS for each penalty, which ends early once the gradient vanishes. Classes
        that can be told apart have no optimum without a penalty: there this is early stopping.

    Raises `UserError` for penalties that are none, and where all rows or none would be held out.
    """
    penalties = sorted(penalties, reverse=True)
    if not penalties or penalties[-1] < 0 or max_steps < 1:
        raise UserError(f"penalties={penalties}, max_steps={max_steps}: expected some, 0 or more")
    is_held_N = held_out_rows(units, held_out)
    if is_held_N.all() or not is_held_N.any():
        raise UserError(
            f"held_out={held_out} of {len(set(units))} different training examples leaves none "
            "to train on, or none to choose the penalty by; give more examples"
        )
    mean_D = features_ND.mean(0, dtype=np.float64).astype(np.float32)
    std_D = features_ND.std(0, dtype=np.float64).astype(np.float32) + 1e-5
    x_ND = (features_ND - mean_D) / std_D
    targets_NC = np.eye(num_classes, dtype=np.float32)[labels_N]
    placed_ND = split_rows(mesh, x_ND)
    kept_NC = split_rows(mesh, np.where(is_held_N[:, None], np.float32(0), targets_NC))
    weights, found, top1 = None, {}, {}
    for penalty in penalties:
        weights = fit(mesh, placed_ND, kept_NC, penalty, max_steps, weights)
        kernel_DC, bias_C = found[penalty] = jax.device_get(weights)
        predicted_N = (x_ND[is_held_N] @ kernel_DC + bias_C).argmax(1)
        top1[penalty] = float((predicted_N == labels_N[is_held_N]).mean())
    best = max(penalties, key=lambda penalty: top1[penalty])  # the first, so the strongest
    weights = fit(mesh, placed_ND, split_rows(mesh, targets_NC), best, max_steps, found[best])
    kernel_DC, bias_C = jax.device_get(weights)
    return LinearProbe(kernel_DC, bias_C, mean_D, std_D, best, top1)


def held_out_rows(units: Sequence[str], share: float) -> Bool[np.ndarray, " N"]:
    """Whether each row is held out: about `share` of the distinct units, the same in every run."""

    def draw(unit: str) -> int:
        return int.from_bytes(hashlib.sha256(unit.encode("utf-8", "surrogatepass")).digest()[:8])

    return np.array([draw(unit) < share * 2**64 for unit in units], bool)


def split_rows(mesh: Mesh, x_ND: np.ndarray) -> Array:
    """Rows over the mesh, zeros behind the last."""
    shards = num_batch_shards(mesh)
    size = -(-len(x_ND) // shards) * shards
    return place(mesh, pad_rows(x_ND.astype(np.float32), size), P(BATCH))


def fit(
    mesh: Mesh,
    x_ND: Array,
    targets_NC: Array,
    penalty: float,
    max_steps: int,
    start: tuple | None = None,
) -> tuple[Array, Array]:
    """(W [D, C], b [C]) at the optimum, or after `max_steps`, from `start` (default: zeros).

    Both arrays are of `split_rows`. Targets are one-hot; rows whose targets are zeros do not count.
    """
    if start is None:
        sizes = x_ND.shape[1], targets_NC.shape[1]
        start = np.zeros(sizes, np.float32), np.zeros(sizes[1], np.float32)
    with jax.set_mesh(mesh):
        weights = jax.tree.map(lambda x: place(mesh, np.asarray(x), replicated), start)
        return _fit(x_ND, targets_NC, np.float32(penalty), max_steps, weights)


@functools.partial(jax.jit, static_argnames="max_steps")
def _fit(x_ND: Array, targets_NC: Array, penalty: Array, max_steps: int, weights: tuple) -> tuple:
    num_rows = jnp.sum(targets_NC)

    def loss(weights):
        kernel_DC, bias_C = weights
        logits_NC = jnp.matmul(x_ND, kernel_DC, precision=lax.Precision.HIGHEST) + bias_C[None]
        logprobs_NC = jax.nn.log_softmax(logits_NC)
        return -jnp.sum(targets_NC * logprobs_NC) / num_rows + penalty / 2 * jnp.sum(kernel_DC**2)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        weights, state, number, _ = carry
        value, grad = value_and_grad(weights, state=state)
        updates, state = optimizer.update(
            grad, state, weights, value=value, grad=grad, value_fn=loss
        )
        return optax.apply_updates(weights, updates), state, number + 1, optax.tree.norm(grad)

    def goes_on(carry):
        return (carry[2] < max_steps) & (carry[3] > _TOLERANCE)

    start = (weights, optimizer.init(weights), jnp.int32(0), jnp.float32(jnp.inf))
    return lax.while_loop(goes_on, step, start)[0]
