"""What the captioning objective draws: modes of rows, masked positions, rows without their image.

Every draw is made from (key, position of the row) alone, so it depends neither on the mesh nor on
how a batch is cut into microbatches.

Letters beyond `capjax.dims`: R rows (the captions of all images), G groups of J consecutive rows.
"""

import fractions
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Bool, Int, PRNGKeyArray, UInt
from capjax.errors import UserError
from capjax.mesh import BATCH, out_sharding

MAX_GROUP = 8  # rows


def draw_rows(
    key: PRNGKeyArray, position_R: UInt[Array, "R"], probability: float
) -> Bool[Array, "R"]:
    """True with the given probability, for each row on its own."""

    def uniform(position):
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(uniform)(position_R) < probability


def causal_rows_of_group(parallel_fraction: float) -> tuple[int, int]:
    """(causal rows, rows) of the smallest group that holds this fraction of parallel rows exactly.

    Raises `UserError` where it has more than eight rows.
    """
    parallel = fractions.Fraction(parallel_fraction).limit_denominator(MAX_GROUP)
    if abs(float(parallel) - parallel_fraction) > 1e-6:
        raise UserError(
            f"objective.captioning.parallel_fraction={parallel_fraction}: "
            f'parallel_draw="fixed" takes multiples of 1/{MAX_GROUP} and other fractions with a '
            f'denominator up to it; the nearest is {parallel}; or set parallel_draw="bernoulli"'
        )
    return parallel.denominator - parallel.numerator, parallel.denominator


def draw_orders(
    key: PRNGKeyArray, position_R: UInt[Array, "R"], group_size: int
) -> Int[Array, "G J"]:
    """A random order of the rows of each group, drawn from its first position // group_size.

    The first c rows in that order are a uniform choice of c rows. Raises `UserError` where the rows
    of a device do not divide into groups.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    shards = math.prod(sizes.get(axis, 1) for axis in BATCH)
    if len(position_R) % (shards * group_size):
        raise UserError(
            f'objective.captioning.parallel_draw="fixed" draws among {group_size} consecutive rows '
            f"of one device, into which {len(position_R)} rows on {shards} devices do not divide; "
            f"make the captions of a microbatch a multiple of {shards * group_size}"
        )
    first_G = as_rows(position_R, (-1, group_size))[:, 0] // group_size

    def order(number):
        return jax.random.permutation(jax.random.fold_in(key, number), group_size)

    return jax.vmap(order)(first_G)


def draw_masked(
    key: PRNGKeyArray,
    position_R: UInt[Array, "R"],
    labels_RL: Int[Array, "R L"],
    ratio: float,
    *,
    among_tokens: bool,
) -> Bool[Array, "R L"]:
    """A random set of positions of each row, of a count that its length fixes.

    Args:
      among_tokens: int(ratio * n) of the n positions that hold a token, but at least one of them;
        otherwise int(ratio * L) of all L positions, padding included, as big_vision does.
    """
    length = labels_RL.shape[1]
    counts_N = [int(ratio * n) for n in range(length + 1)]  # in Python: no rounding of its own
    if among_tokens:
        counts_N = [min(n, max(1, count)) for n, count in enumerate(counts_N)]

    def row(position, labels_L):
        uniform_L = jax.random.uniform(jax.random.fold_in(key, position), (length,))
        if not among_tokens:
            return _ranks(uniform_L) < counts_N[length]
        is_token_L = labels_L != PAD_ID
        is_length_N = jnp.arange(length + 1) == jnp.sum(is_token_L)
        count = jnp.sum(jnp.where(is_length_N, jnp.asarray(counts_N), 0))
        return _ranks(jnp.where(is_token_L, uniform_L, 1.0)) < count  # padding comes last

    return jax.vmap(row)(position_R, labels_RL)


def are_parallel(orders_GJ: Int[Array, "G J"], num_causal: int) -> Bool[Array, "R"]:
    """Which rows, in the order of the batch, come after the first `num_causal` of their group."""
    places_GJ = jax.vmap(jnp.argsort)(orders_GJ)  # of each row in the order of its group
    return join_groups(places_GJ >= num_causal)


def take_in_groups(tree: Any, orders_GJ: Int[Array, "G J"]) -> Any:
    """Arrays [R, ...] as [G, J, ...], each group in its order. No device reads another's rows."""

    def take(x):
        groups = as_rows(x, (*orders_GJ.shape, *x.shape[1:]))
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return (_reordered if is_float else _in_order)(groups, orders_GJ)

    return jax.tree.map(take, tree)


def _in_order(groups, orders_GJ):
    return jax.vmap(lambda rows, order: rows[order])(groups, orders_GJ)


@jax.custom_vjp
def _reordered(groups, orders_GJ):
    """`_in_order`, whose gradient is the inverse order and no scatter.

    XLA lays out what it scatters with the rows last, and with it, on GPUs, all of the encoder.
    """
    return _in_order(groups, orders_GJ)


def _reordered_forward(groups, orders_GJ):
    return _in_order(groups, orders_GJ), orders_GJ


def _reordered_backward(orders_GJ, slope):
    return _in_order(slope, jax.vmap(jnp.argsort)(orders_GJ)), None


_reordered.defvjp(_reordered_forward, _reordered_backward)


def join_groups(tree: Any) -> Any:
    """Arrays [G, J, ...] as [R, ...]."""
    return jax.tree.map(lambda x: as_rows(x, (-1, *x.shape[2:])), tree)


def _ranks(x_L: Array) -> Array:
    return jnp.argsort(jnp.argsort(x_L))


def as_rows(x: Array, shape: tuple[int, ...]) -> Array:
    """`x` in another shape, its leading axis split over the batch axes of the mesh."""
    spec = P(BATCH, *(None,) * (len(shape) - 1))
    return jnp.reshape(x, shape, out_sharding=out_sharding(spec))
