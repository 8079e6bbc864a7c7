"""The collectives of a compiled program, read from its text: what is sent, over which mesh axes.

The text is that of an optimized, partitioned program (`jit(f).lower(…).compile().as_text()`):
shapes are those of one device, and a device is its place in the flattened mesh. It may be compiled
for CPUs, GPUs or TPUs. Between the slices of several TPUs data goes by `send` and `recv`
("megascale"), which are read as the collective that they make up.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from capjax.planning.groups import axes_within, replica_groups, source_target_pairs

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}x\{([\d,:]+)\}"')


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
      kind: one of `KINDS`.
      shapes: such as "bf16[1024,4096]", of the larger side, on one device.
      bytes: of all `shapes`, in one call.
      group_size: devices that take part together.
      axes: the mesh axes along which those differ.
      calls: in one run of the program.
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: int
    group_size: int
    axes: tuple[str, ...]
    calls: int

    @property
    def traffic(self) -> float:
        """Bytes that leave one device in all calls, with ring algorithms."""
        if self.kind == "collective-permute":
            return float(self.calls * self.bytes)
        rounds = 2 if self.kind == "all-reduce" else 1
        return self.calls * rounds * self.bytes * (self.group_size - 1) / self.group_size


class Op(NamedTuple):
    """One instruction: its result's type, what it does, and to which others' results."""

    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # of the line, from the operands on


Computation = dict[str, Op]  # in the order of the text; the last one is the root


def collectives(
    hlo_text: str, mesh_shape: Mapping[str, int], unknown_trips: int
) -> list[Collective]:
    """Every collective of the program, in the order of the text.

    `mesh_shape` has the sizes of the mesh axes in order. A loop whose trip count the text does not
    tell counts `unknown_trips` times, each branch of a conditional as if it were taken. A group of
    one device is left out: it sends nothing.
    """
    computations = parse(hlo_text)
    times = executions(computations, unknown_trips)
    fused = {
        callee
        for computation in computations.values()
        for op in computation.values()
        if op.opcode == "fusion"
        for callee in called(op)
    }
    found: dict[tuple, Collective] = {}
    for name, computation in computations.items():
        for op_name, op in computation.items():
            collective = _collective(computation, op, mesh_shape, name in fused)
            if collective is None or not times[name]:
                continue
            collective = collective._replace(calls=times[name])
            found.setdefault(_chain(op) or (name, op_name), collective)
    return list(found.values())


def parse(text: str) -> dict[str, Computation]:
    """Computations by name; one comes after those that it calls, the entry last."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found[1], {})
        elif found := _INSTRUCTION.match(line):
            name, type_, opcode, rest = found.groups()
            operands = re.findall(r"%([\w.\-]+)", rest[: _closing(rest)])
            current[name] = Op(type_, opcode, tuple(operands), rest)
    return computations


def _closing(text: str) -> int:
    """Where the parenthesis that is open at the start closes."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def called(op: Op) -> list[str]:
    """The computations that an instruction runs, by name."""
    if op.opcode.endswith(("-done", "-update")):
        return []  # what the -start has called
    names = []
    for one, several in _CALLED.findall(op.rest):
        names += [one] if one else [name.strip(" %") for name in several.split(",")]
    return names


def executions(computations: dict[str, Computation], unknown_trips: int) -> defaultdict[str, int]:
    """How often each computation runs."""
    times: defaultdict[str, int] = defaultdict(int)
    for entry in list(computations)[-1:]:
        times[entry] = 1
    for name, computation in reversed(computations.items()):
        for op in computation.values():
            trips = 1
            if op.opcode == "while":
                known = _trips(computations, computation, op)
                trips = unknown_trips if known is None else known
            for callee in called(op):
                times[callee] += times[name] * trips
    return times


def _trips(computations: dict[str, Computation], computation: Computation, loop: Op) -> int | None:
    """The trips of a loop that counts up by one to a constant; None where it is another loop.

    From 0, where the text does not tell what it starts from.
    """
    if found := _TRIPS.search(loop.rest):
        return int(found[1])
    found = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    condition = computations[found[1]] if found else {}
    compare = list(condition.values())[-1:]
    carried = computation[loop.operands[0]]

    def value(name: str) -> int | None:
        op = condition[name]
        if op.opcode == "get-tuple-element" and carried.opcode == "tuple":
            index = re.search(r"index=(\d+)", op.rest)
            op = computation[carried.operands[int(index[1])]] if index else op
        while op.opcode in ("copy", "bitcast") and op.operands[0] in computation:
            op = computation[op.operands[0]]
        digits = re.match(r"(-?\d+)\)", op.rest) if op.opcode == "constant" else None
        return int(digits[1]) if digits else None

    if not compare or compare[0].opcode != "compare" or "direction=LT" not in compare[0].rest:
        return None
    begin, end = (value(name) for name in compare[0].operands)
    return None if end is None else max(end - (begin or 0), 0)


def _collective(
    computation: Computation, op: Op, mesh_shape: Mapping[str, int], is_fused: bool
) -> Collective | None:
    """What `op` exchanges, as of one call; None where it is nothing."""
    if op.opcode == "send":
        return _transfer(computation, op, mesh_shape)
    kind = op.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    types = _shapes(op.type)
    if op.opcode == "all-gather-start":
        types = types[len(types) // 2 :]  # after the operands
    elif op.opcode == "collective-permute-start":
        types = types[:1]
    elif kind == "reduce-scatter":
        types = [shape for name in op.operands for shape in _shapes(computation[name].type)]
    root = list(computation.values())[-1]
    if kind == "all-reduce" and is_fused and root.opcode == "dynamic-slice":
        kind = "reduce-scatter"  # of which a device keeps its part
    if kind == "collective-permute":
        groups = source_target_pairs(op.rest)
        axes = axes_within(groups, mesh_shape)
        size = math.prod(mesh_shape[axis] for axis in axes)
    else:
        groups = replica_groups(op.rest, math.prod(mesh_shape.values()))
        axes, size = axes_within(groups, mesh_shape), len(groups[0])
    return _made(kind, types, size, axes)


def _transfer(
    computation: Computation, send: Op, mesh_shape: Mapping[str, int]
) -> Collective | None:
    """The collective between slices that `send` and the `recv` of the same meeting make up."""
    kind, slices = _TRANSFER.search(send.rest), _SLICES.search(send.rest)
    if kind is None or slices is None:
        return None
    meeting = re.search(r'_rendezvous="[^"]*"', send.rest)
    both = [send] + [
        op
        for op in computation.values()
        if op.opcode == "recv" and meeting is not None and meeting[0] in op.rest
    ]
    types = max(([_shapes(op.type)[0]] for op in both), key=lambda types: types[0][1])
    # Slices are counted from 1, and follow each other in the flattened mesh (see `make_mesh`).
    members, devices = _spans(slices[1]), _spans(slices[2])
    group = np.array([(x - 1) * (max(devices) + 1) for x in members])
    name = kind[1].lower().replace("_", "-")
    name = name if name in KINDS else "collective-permute"
    return _made(name, types, len(members), axes_within([group], mesh_shape))


def _made(
    kind: str, types: list[tuple[str, int]], size: int, axes: tuple[str, ...]
) -> Collective | None:
    if size == 1:
        return None
    shapes = tuple(shape for shape, _ in types)
    return Collective(kind, shapes, sum(count for _, count in types), size, axes, 1)


def _spans(text: str) -> list[int]:
    """ "1,3:5" as [1, 3, 4, 5]."""
    numbers = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _shapes(type_: str) -> list[tuple[str, int]]:
    """Of a type, which may be a tuple, each array's shape and bytes."""
    found = []
    for dtype, sizes in _SHAPE.findall(type_):
        shape = f"{dtype}[{sizes}]"
        found.append((shape, array_bytes(shape)))
    return found


def array_bytes(type_: str) -> int:
    """Of one array, such as "bf16[1024,4096]"; a layout behind it does not matter."""
    found = _SHAPE.match(type_)
    if found is None:
        return 0
    bits = re.search(r"\d+", found[1])
    width = int(bits[0]) if bits else (8 if found[1] == "pred" else 0)
    return -(-math.prod(int(x) for x in found[2].split(",") if x) * width // 8)


def _chain(op: Op) -> tuple | None:
    """What names a collective that a TPU overlaps with computation.

    It is cut up, a part in each of several fusions, and every part is printed as the whole.
    """
    found = re.search(r'channel_id=(\d+).*chain_id="(\d+)"', op.rest)
    return found.groups() if found else None
