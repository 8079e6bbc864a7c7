"""Starting from the parameters of another run, all of them or some subtrees."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from capjax.dims import Array, Params
from capjax.errors import UserError
from capjax.models.resize import resize_position_embedding
from capjax.models.text_decoder import pad_to_lanes
from capjax.training.patterns import by_name, matching

RESIZED = "encoder/position_embedding"  # the patches'
# Of these the first rows count the same in a model of other sizes.
POSITIONS = "decoder/position_embedding"  # of a caption; they are cut or continued, never resized
TOKENS = "decoder/token_embedding/embedding"  # a mask token may add a row, and so padding


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """From where a run takes parameters before its first step.

    Attributes:
      path: a workdir or a checkpoint, of a run or converted; "" takes none.
      include: patterns of the parameters to take ("encoder", "decoder/blocks"); none: all.
      exclude: patterns of those among them that stay as they were drawn.
    """

    path: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


def warm_start(
    params: Params,
    loaded: Params,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    vocab_size: int = 0,
) -> tuple[Params, list[str]]:
    """`params` with the chosen arrays of `loaded` in the place of theirs, and the names of these.

    Every array keeps the dtype and the sharding that it has in `params`. The image encoder's
    position embedding is resized where the grid of patches is another one. For longer captions the
    decoder's positions beyond those loaded stay as drawn, for shorter ones the first are taken.

    Args:
      params: freshly drawn, on the mesh.
      loaded: nested dict of arrays of any kind, each whole on this process.
      include: patterns of what is taken, in `params` or in `loaded`; none: everything.
      exclude: patterns of what is not.
      vocab_size: tokens of both models, of which one may have a mask token besides; 0: not known.

    Raises `UserError` as `fitting_names` does.
    """
    names = fitting_names(params, loaded, include=include, exclude=exclude, vocab_size=vocab_size)
    leaves, there = by_name(params), by_name(loaded)
    for name in names:
        drawn = leaves[name]
        x = _resized(name, np.asarray(there[name]), drawn.shape)
        put = _placed if x.shape == drawn.shape else _with_first_rows
        leaves[name] = put(x, drawn)
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values())), names


def fitting_names(
    params: Params,
    loaded: Params,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    vocab_size: int = 0,
) -> list[str]:
    """The names of what `warm_start` would take. Types do as well as arrays: only shapes are read.

    Raises `UserError` with the whole difference unless exactly what is chosen is in both, in the
    same shapes.
    """
    here, there = by_name(params), by_name(loaded)
    names = {**here, **there}
    chosen = matching(include, names, "warm_start.include") if include else set(names)
    chosen -= matching(exclude, names, "warm_start.exclude")
    if not chosen:
        raise UserError(
            f"warm_start.exclude={tuple(exclude)} leaves nothing of what "
            f"warm_start.include={tuple(include)} takes; exclude less"
        )
    both = sorted(chosen & here.keys() & there.keys())
    shapes = []
    for name in both:
        theirs, ours = tuple(there[name].shape), here[name].shape
        if not (
            theirs == ours
            or _is_resized(name, theirs, ours)
            or _may_differ_in_rows(name, theirs, ours, vocab_size)
        ):
            shapes.append(f"{name} {theirs} instead of {ours}")
    _check(
        {
            "not in what is loaded": sorted(chosen & here.keys() - there.keys()),
            "not in this model": sorted(chosen & there.keys() - here.keys()),
            "shapes": shapes,
        }
    )
    return both


def _is_resized(name: str, shape: tuple[int, ...], here: tuple[int, ...]) -> bool:
    is_table = name == RESIZED and len(shape) == len(here) == 2 and shape[1] == here[1]
    return is_table and all(math.isqrt(rows) ** 2 == rows for rows in (shape[0], here[0]))


def _resized(name: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if x.shape == shape or not _is_resized(name, x.shape, shape):
        return x
    old, new = math.isqrt(len(x)), math.isqrt(shape[0])
    return resize_position_embedding(x.astype(np.float32), old, new)


def _may_differ_in_rows(
    name: str, shape: tuple[int, ...], here: tuple[int, ...], vocab_size: int
) -> bool:
    if name == TOKENS:
        rows = {pad_to_lanes(vocab_size), pad_to_lanes(vocab_size + 1)}
        return vocab_size > 0 and shape[1:] == here[1:] and {shape[0], here[0]} <= rows
    return name == POSITIONS and shape[1:] == here[1:]


def _with_first_rows(x: np.ndarray, drawn: Array) -> Array:
    """`drawn` with as many rows of `x` in the place of its first as both have."""
    num_rows = min(len(x), len(drawn))
    rows, is_taken = np.zeros((2, *drawn.shape), np.float32)
    rows[:num_rows], is_taken[:num_rows] = x[:num_rows], 1
    return jnp.where(_placed(is_taken, drawn) > 0, _placed(rows, drawn), drawn)


def _placed(x: np.ndarray, like: Array) -> Array:
    x = x.astype(like.dtype)
    return jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])


def _check(differences: dict[str, list[str]]) -> None:
    found = [f"{what}: {', '.join(names)}" for what, names in differences.items() if names]
    if found:
        raise UserError(
            f"the warm start does not fit: {'; '.join(found)}; choose what to take with "
            "warm_start.include and warm_start.exclude"
        )
