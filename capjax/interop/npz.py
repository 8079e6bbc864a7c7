"""big_vision's `.npz` files: what wraps the parameters, how arrays are stored, old names.

What comes out of `read_npz` is always the same: the parameters alone, one entry per block ("loop"
layout), under the names of today. Source: `utils.load_params`, `vit.fix_old_checkpoints` and
`text_transformer.load` of google-research/big_vision.
"""

import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from capjax.errors import UserError
from capjax.interop.mapping import FlatArrays, to_float32

LAYOUTS = ("loop", "scan")

# The stacks of blocks: their name in the scan layout, what stands before the number in the loop
# layout, and the axis on which the scan layout stacks.
STACKS = {"encoderblock": ("_", 0), "EncDecBlock": ("", 1)}

# Flax once numbered the modules of a block in one count; now each kind has its own.
_ONE_COUNT = {
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "LayerNorm_2": "LayerNorm_1",
    "MlpBlock_3": "MlpBlock_0",
}
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, NotImplementedError)


def split_subtree(path: str | Path) -> tuple[str, str]:
    """`file.npz:img/` -> (`file.npz`, `img`); without a suffix the second is empty."""
    match = re.fullmatch(r"(.+\.npz):([\w/]+)", str(path))
    return (match[1], match[2].strip("/")) if match else (str(path), "")


def read_npz(source: str | Path | Mapping[str, np.ndarray]) -> FlatArrays:
    """The parameters by their names, float32, in loop layout.

    Args:
      source: a file, perhaps with a sub-tree (`file.npz:img`), or arrays by name; the parameters
        are under `params/`, under `opt/target/` or at the top; bfloat16 may be raw 2-byte items.

    Raises `UserError` for a file that cannot be read, and for a sub-tree that it lacks.
    """
    if isinstance(source, Mapping):
        arrays = {name: source[name] for name in _wanted(source)}
        return modernised(unstacked(_unwrapped(arrays)))
    path, subtree = split_subtree(source)
    try:
        with Path(path).open("rb") as file:
            opened = np.load(file, allow_pickle=False)
            if isinstance(opened, np.ndarray):
                raise UserError(f"{path}: one array, expected an .npz file of many")
            arrays = {name: opened[name] for name in _wanted(opened.files)}
    except (*_UNREADABLE, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a readable .npz file ({error})") from error
    arrays = _unwrapped(arrays)
    if subtree:
        below = {
            name.removeprefix(f"{subtree}/"): x
            for name, x in arrays.items()
            if name.startswith(f"{subtree}/")
        }
        if not below:
            tops = sorted({name.split("/")[0] for name in arrays})
            raise UserError(f"{path} has no sub-tree {subtree!r}; it has {', '.join(tops)}")
        arrays = below
    return modernised(unstacked(arrays))


def _wanted(names) -> list[str]:
    """The names of parameters, not of the optimizer's state beside them."""
    for prefix in ("params/", "opt/target/"):
        chosen = [name for name in names if name.startswith(prefix)]
        if chosen:
            return chosen
    return list(names)


def _unwrapped(arrays: FlatArrays) -> FlatArrays:
    prefix = re.compile("^(params|opt/target)/")
    return {prefix.sub("", name): to_float32(x) for name, x in arrays.items()}


def unstacked(arrays: FlatArrays) -> FlatArrays:
    """Scan layout to loop layout, as views; what is in loop layout stays."""
    loop: FlatArrays = {}
    for name, x in arrays.items():
        match = re.fullmatch(rf"(.*/)?({'|'.join(STACKS)})/(.+)", name)
        if match is None:
            loop[name] = x
            continue
        before, stack, after = match.groups(default="")
        separator, axis = STACKS[stack]
        if x.ndim <= axis:
            raise UserError(f"{name} has the shape {x.shape}: expected the blocks on axis {axis}")
        for i, layer in enumerate(np.moveaxis(x, axis, 0)):
            loop[f"{before}{stack}{separator}{i}/{after}"] = layer
    return loop


def stacked(arrays: FlatArrays) -> FlatArrays:
    """Loop layout to scan layout."""
    blocks: dict[tuple[str, int], dict[int, np.ndarray]] = {}
    scan: FlatArrays = {}
    for name, x in arrays.items():
        for stack, (separator, axis) in STACKS.items():
            match = re.fullmatch(rf"(.*/)?{stack}{separator}(\d+)/(.+)", name)
            if match is not None:
                before, number, after = match.groups(default="")
                blocks.setdefault((f"{before}{stack}/{after}", axis), {})[int(number)] = x
                break
        else:
            scan[name] = x
    for (name, axis), layers in blocks.items():
        scan[name] = np.stack([layers[i] for i in sorted(layers)], axis)
    return scan


def modernised(arrays: FlatArrays) -> FlatArrays:
    """Old names and old ways to keep positions, as today's."""
    arrays = _in_separate_counts(arrays)
    for name in list(arrays):
        if match := re.fullmatch(r"(.*/)?Transformer/(?:posembed_input/)?pos_embedding", name):
            arrays[f"{match[1] or ''}pos_embedding"] = arrays.pop(name)
        elif match := re.fullmatch(r"(.*/)?Encoder_0/pos_embedding", name):  # added twice
            total = f"{match[1] or ''}pos_embedding"
            arrays[total] = arrays.pop(name) + arrays.get(total, 0)
        elif match := re.fullmatch(r"(.*/)?probe", name):
            _put_in_map_head(arrays, match[1] or "")
    for name in list(arrays):
        if match := re.fullmatch(r"(.*/)?pos_embedding", name):
            _split_class_token(arrays, match[1] or "")
    return arrays


def _in_separate_counts(arrays: FlatArrays) -> FlatArrays:
    if not any("/MlpBlock_3/" in name for name in arrays):
        return dict(arrays)
    return {"/".join(_ONE_COUNT.get(x, x) for x in k.split("/")): v for k, v in arrays.items()}


def _put_in_map_head(arrays: FlatArrays, tower: str) -> None:
    """The pooling head, where its parts lie directly in the tower."""
    if tower.endswith("MAPHead_0/"):
        return
    for part in ("probe", "MlpBlock_0/", "MultiHeadDotProductAttention_0/", "LayerNorm_0/"):
        for name in [name for name in arrays if name.startswith(tower + part)]:
            arrays[f"{tower}MAPHead_0/{name.removeprefix(tower)}"] = arrays.pop(name)


def _split_class_token(arrays: FlatArrays, tower: str) -> None:
    """The position of the class token, where it leads those of the patches, goes into the token."""
    positions = arrays[f"{tower}pos_embedding"]
    if f"{tower}embedding/kernel" not in arrays or positions.ndim != 3:
        return
    if math.isqrt(positions.shape[1]) ** 2 + 1 == positions.shape[1]:
        arrays[f"{tower}pos_embedding"] = positions[:, 1:]
        if f"{tower}cls" in arrays:
            arrays[f"{tower}cls"] = arrays[f"{tower}cls"] + positions[:, :1]
