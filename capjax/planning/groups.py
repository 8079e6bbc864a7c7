"""Which devices exchange data: XLA's notations for groups of devices, and the mesh axes they span.

A device is its place in the flattened mesh. The notations (XLA's `hlo/ir/replica_group.h`):

    {{0,1},{2,3}}                                           each group by itself; {}: all devices
    [4,2]<=[8]    [4,2]<=[2,4]T(1,0)                        counted up, turned, cut into rows
    mesh['a'=2,'b'=4] {'b'}                                 along axes of a mesh of XLA's own
    mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a':(1)2}  of permuted devices, a part of an axis
"""

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

_LISTED = re.compile(r"replica_groups=(\{(?:\{[\d,]*\},?)*\})")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_OF_A_MESH = re.compile(
    r"replica_groups=(?:\w+ )?mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}"
)
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_PAIRS = re.compile(r"source_target_pairs=(\{(?:\{\d+,\d+\},?)*\})")


def replica_groups(attributes: str, num_devices: int) -> list[np.ndarray]:
    """The groups that an instruction's attributes name. Raises `ValueError` where they do not."""
    if found := _COUNTED.search(attributes):
        rows, sizes, order = (_numbers(x) for x in found.groups())
        return list(_counted(sizes, order).reshape(rows))
    if found := _OF_A_MESH.search(attributes):
        return list(_of_a_mesh(*found.groups()))
    if found := _LISTED.search(attributes):
        return _listed(found[1]) or [np.arange(num_devices)]
    raise ValueError(f"no groups of devices that are understood in: {attributes[:300]}")


def source_target_pairs(attributes: str) -> list[np.ndarray]:
    """The pairs (from, to) of a permutation."""
    found = _PAIRS.search(attributes)
    return _listed(found[1]) if found else []


def axes_within(groups: Iterable[np.ndarray], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ, in the mesh's order."""
    differs = np.zeros(len(mesh_shape), bool)
    for group in groups:
        places = np.array(np.unravel_index(group, tuple(mesh_shape.values())))
        differs |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, is_along in zip(mesh_shape, differs, strict=True) if is_along)


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(x) for x in (text or "").split(",") if x)


def _listed(text: str) -> list[np.ndarray]:
    return [np.array(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", text[1:-1])]


def _counted(sizes: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(order) if order else ids


def _of_a_mesh(axes: str, devices: str | None, along: str) -> np.ndarray:
    sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(axes)}
    if not devices:
        ids = np.arange(math.prod(sizes.values()))
    elif found := _ORDER.match(devices):
        ids = _counted(_numbers(found[1]), _numbers(found[2]))
    else:
        ids = np.array(_numbers(devices))
    # Each axis as three: what is major to the part in use, that part, and what is minor to it.
    parts = {name: (size, 1, 1) for name, size in sizes.items()}
    for name, _, major, size in _AXIS.findall(along):
        before, used = (int(major), int(size)) if size else (1, sizes[name])
        parts[name] = (before, used, sizes[name] // (before * used))
    ids = ids.reshape([size for part in parts.values() for size in part])
    names = list(sizes)
    used_axes = [3 * names.index(name) + 1 for name, *_ in _AXIS.findall(along)]
    ids = np.moveaxis(ids, used_axes, range(-len(used_axes), 0))
    size = math.prod(ids.shape[ids.ndim - len(used_axes) :])
    return ids.reshape(-1, size)
