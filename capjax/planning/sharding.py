"""Where the state of a run lies: how every leaf is split over the mesh, and what a chip holds."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

MIB = 2**20


class Row(NamedTuple):
    """One leaf of the state.

    Attributes:
      name: such as "params/encoder/blocks/mlp/up/kernel".
      spec: the mesh axis, or axes, that split each axis of `shape`.
      bytes: of the whole leaf.
      bytes_a_chip: of the part that one device holds.
      replicated_over: the mesh axes of more than one device that do not split it, along which
        every device holds the same.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: P
    bytes: int
    bytes_a_chip: int
    replicated_over: tuple[str, ...]


def sharding_table(abstract_state: Any, mesh: Mesh) -> list[Row]:
    """A row for every leaf of a tree of arrays on `mesh`, concrete or abstract, in its order."""
    return [
        _row(jax.tree_util.keystr(path, simple=True, separator="/"), x, mesh)
        for path, x in jax.tree.leaves_with_path(abstract_state)
    ]


def _row(name: str, x: Any, mesh: Mesh) -> Row:
    spec = x.sharding.spec
    spec = P(*spec, *(None,) * (len(x.shape) - len(spec)))
    used = {axis for axes in spec for axis in _axes(axes)}
    size = math.prod(x.shape) * x.dtype.itemsize
    parts = math.prod(mesh.shape[axis] for axis in used)
    whole = tuple(axis for axis, count in mesh.shape.items() if count > 1 and axis not in used)
    return Row(name, x.shape, str(x.dtype), spec, size, size // parts, whole)


def _axes(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def replicated_by_accident(rows: Iterable[Row], limit: int = MIB) -> list[Row]:
    """The leaves of more than `limit` bytes that are not split over the axis `fsdp`.

    Smaller ones, biases and norms, are meant to be whole on every device.
    """
    return [row for row in rows if row.bytes > limit and "fsdp" in row.replicated_over]


def render(rows: Iterable[Row]) -> str:
    """The table as text: a line for every leaf, then what each part of the state takes."""
    rows = list(rows)
    sums: dict[str, list[int]] = {}
    for row in rows:
        part = sums.setdefault(row.name.split("/")[0], [0, 0])
        part[0] += row.bytes
        part[1] += row.bytes_a_chip
    lines = [("leaf", "type", "split over", "MiB", "MiB a chip", "replicated over")]
    lines += [
        (
            row.name,
            f"{row.dtype}[{','.join(map(str, row.shape))}]",
            " ".join("+".join(_axes(axes)) or "-" for axes in row.spec) or "-",
            f"{row.bytes / MIB:.3f}",
            f"{row.bytes_a_chip / MIB:.3f}",
            " ".join(row.replicated_over) or "-",
        )
        for row in rows
    ]
    lines += [
        (f"{name} in all", "", "", f"{whole / MIB:.3f}", f"{chip / MIB:.3f}", "")
        for name, (whole, chip) in sums.items()
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in (3, 4) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
