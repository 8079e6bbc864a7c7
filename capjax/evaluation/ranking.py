"""Exact ranks and nearest neighbours among any number of rows, shared by the devices of a mesh.

A matrix product in floating point depends on its shape, and so do the ties and ranks read from it.
Here embeddings are cut into whole numbers small enough that every product of them is exact, in any
order of summation, in float32 and in the bfloat16 of accelerators (Ozaki et al. 2012, "Error-free
transformations of matrix multiplication"). Equal pairs have equal similarities, whatever the block
or the device; those of rows of length 1 are right to about 1e-7, as float32 embeddings are.

Queries are split over the devices, targets pass by a block at a time: no device holds more than
`QUERIES` rows of its own, `TARGETS` rows and one tile of `TILE` x `TARGETS` similarities.

Letters: N queries, M targets, D width, K values a query, E pairs; Q queries and C targets of a
block, R queries of a tile or rows of bounds; G groups, I queries and J targets of a group.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from capjax.dims import Array
from capjax.errors import UserError
from capjax.mesh import AXES

QUERIES = 16384  # of a device at a time
TARGETS = 8192  # that pass by at a time
TILE = 512  # queries compared with them at a time
WIDTH = 4  # times the mean number of pairs: those that a query's row holds
PRECISION = 24  # bits of a coordinate, the longest row being 1
SLACK = 1 + 2**-16  # by which a row may be longer than 1: the rounding of its division
EXACT = 2**24  # the whole numbers that a float32 holds
NO_TARGET = -1  # a query that leaves no target out


class Ranking(NamedTuple):
    """Where pairs that belong together stand among those that do not.

    better_E: how many targets that do not belong to the pair's query are as similar as the pair or
      more; strictly_E: how many are more similar.
    """

    better_E: np.ndarray
    strictly_E: np.ndarray


def rank_pairs(
    queries_ND: np.ndarray,
    targets_MD: np.ndarray,
    query_E: np.ndarray,
    target_E: np.ndarray,
    mesh: Mesh | None = None,
) -> Ranking:
    """Ranks the pairs (query_E[e], target_E[e]), all that belong together, each once.

    A query may have any number of targets and a target of queries. Every process gives the same
    arrays and gets the same result. Memory and time grow with the rows and with the pairs. Raises
    `UserError` for embeddings that are not finite.
    """
    own_E = pair_similarities(queries_ND, targets_MD, query_E, target_E)
    found_E2 = _count_above_pairs(queries_ND, targets_MD, query_E, own_E, mesh)
    return Ranking(*(found_E2 - _own_above_pairs(query_E, own_E)).T)


def _count_above_pairs(queries_ND, targets_MD, query_E, own_E, mesh: Mesh | None) -> np.ndarray:
    """int64 [E, 2]: how many targets are at least as similar to the query as the pair, and more.

    A query that has many more pairs than others is compared in several rows, so that the bounds of
    all are a matrix of few empty places.
    """
    counts_N = np.bincount(query_E, minlength=len(queries_ND))
    width = int(min(counts_N.max(), WIDTH * -(-len(query_E) // len(queries_ND))))
    rows_N = np.maximum(1, -(-counts_N // width))
    order_E = np.argsort(query_E, kind="stable")
    number_E = np.empty(len(query_E), np.int64)  # of the pair among those of its query
    number_E[order_E] = np.arange(len(query_E)) - np.repeat(
        np.cumsum(counts_N) - counts_N, counts_N
    )
    row_E = (np.cumsum(rows_N) - rows_N)[query_E] + number_E // width
    bounds_RK2 = np.full((rows_N.sum(), width, 2), np.inf, np.float32)
    bounds_RK2[row_E, number_E % width] = np.stack([own_E, _next_above(own_E)], 1)
    if (rows_N > 1).any():
        queries_ND = np.repeat(queries_ND, rows_N, 0)
    found_RK = count_at_least(queries_ND, targets_MD, bounds_RK2.reshape(-1, 2 * width), mesh)
    return found_RK.reshape(bounds_RK2.shape)[row_E, number_E % width]


def _own_above_pairs(query_E: np.ndarray, own_E: np.ndarray) -> np.ndarray:
    """int64 [E, 2]: how many of its query's pairs are at least as similar as the pair, and more."""
    order_E = np.lexsort((-own_E, query_E))
    query_E, own_E = query_E[order_E], own_E[order_E]
    is_new_query_E = np.diff(query_E, prepend=-1) != 0
    is_first_E = is_new_query_E | (np.diff(own_E, prepend=np.nan) != 0)  # of equals
    place_E = np.arange(len(query_E))
    start_E = np.maximum.accumulate(np.where(is_new_query_E, place_E, 0))
    firsts = np.append(np.flatnonzero(is_first_E), len(query_E))
    run_E = np.cumsum(is_first_E)
    counts_E2 = np.empty((len(query_E), 2), np.int64)
    counts_E2[order_E] = np.stack([firsts[run_E] - start_E, firsts[run_E - 1] - start_E], 1)
    return counts_E2


def _next_above(x: np.ndarray) -> np.ndarray:
    """The next float32 that devices tell from `x`: they take those below the normal ones for 0."""
    above, tiny = np.nextafter(x, np.float32(np.inf)), np.finfo(np.float32).tiny
    return np.where(np.abs(above) < tiny, np.where(x < 0, np.float32(0), tiny), above)


def count_at_least(
    queries_ND: np.ndarray,
    targets_MD: np.ndarray,
    bounds_NK: np.ndarray,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """int64 [N, K]: how many targets are at least as similar to the query as each of its bounds."""
    _check(queries_ND, targets_MD)
    exponents = _exponent(queries_ND), _exponent(targets_MD)
    parts = []
    for queries_QD, bounds_QK in _query_blocks(mesh, queries_ND, bounds_NK.astype(np.float32)):
        total_QK = _place(mesh, P(AXES), np.zeros(bounds_QK.shape, np.int32))
        for targets_CD, _, num_valid in _target_blocks(mesh, targets_MD):
            total_QK = _count(
                mesh, exponents, queries_QD, bounds_QK, total_QK, targets_CD, num_valid
            )
        parts.append(_to_host(total_QK))
    return np.concatenate(parts)[: len(queries_ND)].astype(np.int64)


def nearest(
    queries_ND: np.ndarray,
    targets_MD: np.ndarray,
    count: int,
    mesh: Mesh | None = None,
    exclude_N: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(similarity, index) [N, count] of each query's most similar targets, best first.

    Of equals the one of lower index is first. `exclude_N` names a target that a query leaves out,
    such as itself. Raises `UserError` where there are fewer targets than `count`.
    """
    _check(queries_ND, targets_MD)
    available = len(targets_MD) - (exclude_N is not None)
    if not 1 <= count <= available:
        raise UserError(f"count={count}: expected 1 to {available}, as there are so many targets")
    exclude_N = np.full(len(queries_ND), NO_TARGET) if exclude_N is None else exclude_N
    exponents = _exponent(queries_ND), _exponent(targets_MD)
    parts = []
    for queries_QD, exclude_Q in _query_blocks(mesh, queries_ND, exclude_N.astype(np.int32)):
        best = _no_best(mesh, len(queries_QD), count)
        for targets_CD, start, num_valid in _target_blocks(mesh, targets_MD):
            best = _nearest(
                mesh, exponents, queries_QD, exclude_Q, *best, targets_CD, start, num_valid
            )
        parts.append([_to_host(x) for x in best])
    similarity_NK, index_NK = (
        np.concatenate(x)[: len(queries_ND)] for x in zip(*parts, strict=True)
    )
    return similarity_NK, index_NK


def pair_similarities(
    queries_ND: np.ndarray, targets_MD: np.ndarray, query_E: np.ndarray, target_E: np.ndarray
) -> np.ndarray:
    """float32 [E]: the similarities of the pairs, the same bits as everywhere else here."""
    _check(queries_ND, targets_MD)
    exponents = _exponent(queries_ND), _exponent(targets_MD)
    parts = [np.zeros(0, np.float32)]
    for start in range(0, len(query_E), QUERIES):
        rows = slice(start, start + QUERIES)
        a_ED = _padded(queries_ND[query_E[rows]], min(QUERIES, len(query_E)))
        b_ED = _padded(targets_MD[target_E[rows]], len(a_ED))
        parts.append(np.asarray(_pairs(exponents, a_ED, b_ED))[: len(query_E[rows])])
    return np.concatenate(parts)


def group_similarities(queries_GID: np.ndarray, targets_GJD: np.ndarray) -> np.ndarray:
    """float32 [G, I, J]: of each group's queries with its targets."""
    _check(queries_GID, targets_GJD)
    exponents = _exponent(queries_GID), _exponent(targets_GJD)
    return np.asarray(_groups(exponents, queries_GID, targets_GJD))


def _check(queries_ND: np.ndarray, targets_MD: np.ndarray) -> None:
    for name, x in (("queries", queries_ND), ("targets", targets_MD)):
        if not len(x) or not np.isfinite(x).all():
            raise UserError(
                f"{name}: expected at least one row and finite embeddings, found {len(x)} rows, "
                f"{np.count_nonzero(~np.isfinite(x))} values not finite; is the checkpoint sound?"
            )
    if queries_ND.shape[-1] != targets_MD.shape[-1]:
        raise UserError(
            f"queries of width {queries_ND.shape[-1]} and targets of width "
            f"{targets_MD.shape[-1]}: expected embeddings of one space"
        )


def _exponent(x_ND: np.ndarray) -> int:
    """Of the power of two that no row is longer than, rounding aside."""
    longest = math.sqrt(np.einsum("...d,...d->...", x_ND, x_ND, dtype=np.float64).max())
    return math.frexp(longest / SLACK)[1]


@functools.cache
def _bits(width: int) -> int:
    """Bits of a piece, such that no product of pieces leaves the whole numbers of a float32.

    The first piece of a row of length 1 is at most 2^b + sqrt(D)/2 long, the later ones, up to half
    as large in every coordinate, sqrt(D) 2^(b-1). Bfloat16 holds 8 bits.
    """
    for bits in range(8, 0, -1):
        first = (2**bits + math.sqrt(width) / 2) * SLACK
        mixed, later = first * math.sqrt(width) * 2 ** (bits - 1), width * 4 ** (bits - 1)
        if max(first * first, mixed, later) <= EXACT:
            return bits
    raise UserError(f"embeddings of width {width}: expected at most {EXACT}")


def _num_pieces(bits: int) -> int:
    return -(-PRECISION // bits)


def _pieces(x: Array, exponent: int, bits: int) -> list[Array]:
    """`x` as whole numbers, each 2^bits finer than the one before."""
    rest, pieces = x * 2.0 ** (bits - exponent), []
    for _ in range(_num_pieces(bits)):
        pieces.append(jnp.round(rest))
        rest = (rest - pieces[-1]) * 2.0**bits
    return pieces


def _similarity(subscripts: str, exponents: tuple[int, int], a: Array, b: Array) -> Array:
    """The dot products along the last axis, float32."""
    bits = _bits(a.shape[-1])
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16  # fast and exact
    a_pieces = [x.astype(dtype) for x in _pieces(a.astype(jnp.float32), exponents[0], bits)]
    b_pieces = [x.astype(dtype) for x in _pieces(b.astype(jnp.float32), exponents[1], bits)]
    total = jnp.float32(0)
    # Products of pieces i and j weigh 2^(-bits (i + j)): the finest first, always in this order.
    # Those beyond the number of pieces are left out, below the last bit of a float32.
    for order in range(len(a_pieces), -1, -1):
        total = total * 2.0**-bits
        for i in range(order + 1):
            if max(i, order - i) < len(a_pieces):
                pieces = a_pieces[i], b_pieces[order - i]
                total += jnp.einsum(subscripts, *pieces, preferred_element_type=jnp.float32)
    return total * 2.0 ** (sum(exponents) - 2 * bits)


def _per_tile(function, *rows_Q):
    """`function` of `TILE` of a device's rows at a time."""
    size = min(TILE, len(rows_Q[0]))
    tiles = [x.reshape(-1, size, *x.shape[1:]) for x in rows_Q]
    made = jax.lax.map(lambda tile: function(*tile), tiles)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)


def _per_device(mesh: Mesh | None, function, rows_Q: tuple, shared: tuple):
    """`function(*rows, *shared)` of each device's rows; what it returns leads with them."""
    if mesh is None:
        return function(*rows_Q, *shared)
    in_specs = (P(AXES),) * len(rows_Q) + (P(),) * len(shared)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=P(AXES))(
        *rows_Q, *shared
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count(mesh, exponents, queries_QD, bounds_QK, total_QK, targets_CD, num_valid):
    def device(queries_QD, bounds_QK, total_QK, targets_CD, num_valid):
        def tile(queries_RD, bounds_RK, total_RK):
            similarity_RC = _similarity("rd,cd->rc", exponents, queries_RD, targets_CD)
            is_target_C = jnp.arange(len(targets_CD)) < num_valid
            similarity_RC = jnp.where(is_target_C[None], similarity_RC, -jnp.inf)
            found_KR = jax.lax.map(
                lambda bound_R: jnp.sum(similarity_RC >= bound_R[:, None], 1), bounds_RK.T
            )
            return total_RK + found_KR.T

        return _per_tile(tile, queries_QD, bounds_QK, total_QK)

    rows = queries_QD, bounds_QK, total_QK
    return _per_device(mesh, device, rows, (targets_CD, num_valid))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nearest(
    mesh, exponents, queries_QD, exclude_Q, best_QK, index_QK, targets_CD, start, num_valid
):
    def device(queries_QD, exclude_Q, best_QK, index_QK, targets_CD, start, num_valid):
        index_C = jnp.arange(len(targets_CD))

        def tile(queries_RD, exclude_R, best_RK, index_RK):
            similarity_RC = _similarity("rd,cd->rc", exponents, queries_RD, targets_CD)
            is_left_out_RC = (index_C >= num_valid)[None] | (
                exclude_R[:, None] == (start + index_C)[None]
            )
            similarity_RC = jnp.where(is_left_out_RC, -jnp.inf, similarity_RC)
            # Of equals `top_k` takes the first: those of earlier blocks, then the lower index.
            all_index_RC = jnp.broadcast_to((start + index_C)[None], similarity_RC.shape)
            best_RK, place_RK = jax.lax.top_k(
                jnp.concatenate([best_RK, similarity_RC], 1), best_RK.shape[1]
            )
            index_RK = jnp.concatenate([index_RK, all_index_RC], 1)
            return best_RK, jnp.take_along_axis(index_RK, place_RK, 1)

        return _per_tile(tile, queries_QD, exclude_Q, best_QK, index_QK)

    rows = queries_QD, exclude_Q, best_QK, index_QK
    return _per_device(mesh, device, rows, (targets_CD, start, num_valid))


@functools.partial(jax.jit, static_argnums=0)
def _pairs(exponents, a_ED, b_ED):
    return _similarity("ed,ed->e", exponents, a_ED, b_ED)


@functools.partial(jax.jit, static_argnums=0)
def _groups(exponents, queries_GID, targets_GJD):
    return _similarity("gid,gjd->gij", exponents, queries_GID, targets_GJD)


def _query_blocks(mesh: Mesh | None, *rows_N: np.ndarray) -> Iterator[tuple[Array, ...]]:
    """The rows in blocks of one size, split over the devices; the last is filled up with zeros."""
    devices = 1 if mesh is None else mesh.size
    share = min(QUERIES, -(-len(rows_N[0]) // devices))
    share = -(-share // TILE) * TILE if share > TILE else share
    for start in range(0, len(rows_N[0]), share * devices):
        block = (_padded(x[start : start + share * devices], share * devices) for x in rows_N)
        yield tuple(_place(mesh, P(AXES), x) for x in block)


def _target_blocks(mesh: Mesh | None, targets_MD: np.ndarray) -> Iterator[tuple[Array, int, int]]:
    """(rows, the first one's index, how many are not filling), every device having all the rows."""
    size = min(TARGETS, len(targets_MD))
    for start in range(0, len(targets_MD), size):
        block_CD = targets_MD[start : start + size]
        yield _place(mesh, P(), _padded(block_CD, size)), start, len(block_CD)


def _no_best(mesh: Mesh | None, size: int, count: int) -> tuple[Array, Array]:
    best_QK = np.full((size, count), -np.inf, np.float32)
    return _place(mesh, P(AXES), best_QK), _place(mesh, P(AXES), np.zeros((size, count), np.int32))


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    return np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)])


def _place(mesh: Mesh | None, spec: P, x: np.ndarray) -> Array:
    if mesh is None:
        return jnp.asarray(x)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda part: x[part])


def _to_host(x: Array) -> np.ndarray:
    """The whole of it: of a mesh of several processes each has a part, else all is here."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
