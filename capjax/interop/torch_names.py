"""PyTorch's way to store our parameters: names, and the axes of each array."""

from collections.abc import Iterator

import numpy as np

from capjax.interop.mapping import (
    FlatArrays,
    Groups,
    Leaf,
    Modules,
    Shapes,
    Table,
    depth_of,
    leaves,
    to_float32,
)

_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def torch_table(shapes: Shapes, modules: Modules, stacks: dict[str, tuple[str, Modules]]) -> Table:
    """The table of a PyTorch model.

    Args:
      shapes: of our parameters; what they lack is left out.
      modules: (theirs, ours, which of the kernels side by side or None); "…in_proj" is all of them
        in one array, as `torch.nn.MultiheadAttention` keeps them.
      stacks: their name of a block with `{}` for its number -> (our stack, modules in it).
    """
    table = dict(_named(leaves(modules, shapes), shapes))
    for name, (root, inside) in stacks.items():
        for i in range(depth_of(shapes, root)):
            block = leaves(inside, shapes, root, i)
            table |= {f"{name.format(i)}.{k}": leaf for k, leaf in _named(block, shapes)}
    return table


def _named(found: Iterator[tuple[str, str, Leaf]], shapes: Shapes) -> Iterator[tuple[str, Leaf]]:
    for module, leaf_name, leaf in found:
        packed = module.endswith("in_proj")
        name = f"{module}{'_' if packed else '.'}{_LEAF_NAMES[leaf_name]}"
        axes = len(shapes[leaf.path]) - sum(isinstance(x, int) for x in leaf.index)
        yield name, leaf._replace(groups=_groups(leaf.path, leaf_name, axes, packed))


def _groups(path: str, leaf_name: str, axes: int, packed: bool) -> Groups | None:
    """Theirs is (out, in) where ours is (in, out), heads and their width being one axis."""
    if packed:
        return ((2, 1, 3), (0,)) if leaf_name == "kernel" else ((1, 0, 2),)
    if leaf_name == "embedding" or (leaf_name == "scale"):
        return None
    if leaf_name == "bias":
        return ((0, 1),) if axes == 2 else None
    if axes == 4:  # a convolution: (out, channels, rows, columns)
        return ((3,), (2,), (0,), (1,))
    if axes == 3:
        return ((2,), (0, 1)) if path.endswith("/out/kernel") else ((1, 2), (0,))
    return ((1,), (0,))


def fold_class_token(arrays: FlatArrays, token: str, positions: str) -> None:
    """Gives the class token its position, in place, as ours has none: the same function."""
    found = [arrays[name] for name in (token, positions) if name in arrays]
    if len(found) == 2 and found[0].shape[-1] == found[1].shape[-1]:
        tokens, places = (to_float32(x).reshape(-1, x.shape[-1]) for x in found)
        arrays[token], arrays[positions] = tokens + places[:1], places[1:]


def unfold_class_token(arrays: FlatArrays, token: str, positions: str) -> None:
    """The inverse of `fold_class_token`, with a position of zeros."""
    arrays[positions] = np.concatenate([np.zeros_like(arrays[token]), arrays[positions]])
