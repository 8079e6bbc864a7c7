"""Starting from the parameters of another run, all of them or some subtrees."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from capjax.dims import Array, Params
from capjax.errors import UserError
from capjax.models.resize import resize_position_embedding
from capjax.training.patterns import by_name, matching

RESIZED = "encoder/position_embedding"  # the patches'; a text's is never resized


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
    params: Params, loaded: Params, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[Params, list[str]]:
    """`params` with the chosen arrays of `loaded` in the place of theirs, and the names of these.

    Every array keeps the dtype and the sharding that it has in `params`. The image encoder's
    position embedding is resized where the grid of patches is another one.

    Args:
      params: freshly drawn, on the mesh.
      loaded: nested dict of arrays of any kind, each whole on this process.
      include: patterns of what is taken, in `params` or in `loaded`; none: everything.
      exclude: patterns of what is not.

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
    new, shapes = {}, []
    for name in sorted(chosen & here.keys() & there.keys()):
        x = _fitted(name, np.asarray(there[name]), here[name].shape)
        if x.shape == here[name].shape:
            new[name] = _placed(x, here[name])
        else:
            shapes.append(f"{name} {x.shape} instead of {here[name].shape}")
    _check(
        {
            "not in what is loaded": sorted(chosen & here.keys() - there.keys()),
            "not in this model": sorted(chosen & there.keys() - here.keys()),
            "shapes": shapes,
        }
    )
    leaves = [new.get(name, x) for name, x in here.items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves), sorted(new)


def _fitted(name: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if name != RESIZED or x.ndim != 2 or x.shape[1:] != shape[1:]:
        return x
    old, new = math.isqrt(len(x)), math.isqrt(shape[0])
    return resize_position_embedding(x.astype(np.float32), old, new) if old**2 == len(x) else x


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
