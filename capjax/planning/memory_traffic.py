"""Bytes that a compiled program moves to and from a device's memory, read from its text.

What XLA says of itself (`cost_analysis`) takes the body of a loop once. Here every instruction
counts as often as it runs: an operand is read and a result written once, inside a fusion nothing
moves, of a slice only what is cut out or in. What a TPU keeps in its on-chip memory (`S(1)` in a
layout) is left out, and so is the padding of its tiles.
"""

import re

from capjax.planning.hlo import Computation, Op, array_bytes, called, executions, parse

_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "async",
    "after-all",
    "iota",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
_CUTS = ("slice", "dynamic-slice", "gather")
_ARRAY = re.compile(r"\b[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?")


def bytes_moved(hlo_text: str, unknown_trips: int) -> float:
    """Bytes of one device in one run; loops of unknown length run `unknown_trips` times.

    The text is that of `collectives`. Every branch of a conditional counts as if it were taken, and
    a loop's condition not at all.
    """
    computations = parse(hlo_text)
    times = executions(computations, unknown_trips)
    inside = {  # of fusions, reductions and the like
        name
        for computation in computations.values()
        for op in computation.values()
        if op.opcode not in ("while", "conditional", "call", "async-start")
        for name in called(op)
    }
    return float(
        sum(
            times[name] * _moved(computations, computation, op)
            for name, computation in computations.items()
            if name not in inside and times[name]
            for op in computation.values()
        )
    )


def _moved(computations: dict[str, Computation], computation: Computation, op: Op) -> int:
    """Of one run of one instruction; of an asynchronous one the start reads, the end writes."""
    opcode = op.opcode.removesuffix("-start").removesuffix("-done")
    is_start, is_done = op.opcode.endswith("-start"), op.opcode.endswith("-done")
    if opcode in _FREE or opcode.endswith("-update"):
        return 0
    operands = [computation[name].type for name in op.operands if name in computation]
    if opcode == "custom-call" and not operands:
        return 0  # it sets memory aside
    if opcode in _CUTS:
        return 0 if is_start else _size(op.type, everywhere=True) + _size(op.type)
    if opcode == "dynamic-update-slice":
        return 2 * _size(operands[1], everywhere=True)
    if opcode == "fusion":
        fused = computations[called(op)[0]]
        read = sum(
            min(_size(type_), _read(computations, fused, i)) for i, type_ in enumerate(operands)
        )
        return read + _written(fused, op.type)
    read = 0 if is_done else sum(map(_size, operands))
    return read + (0 if is_start else _size(op.type))


def _read(computations: dict[str, Computation], fused: Computation, index: int) -> int:
    """Bytes that a fusion reads of its operand `index`."""
    names = {
        name
        for name, op in fused.items()
        if op.opcode == "parameter" and op.rest.startswith(f"{index})")
    }
    total = 0
    for name, op in fused.items():
        places = [i for i, operand in enumerate(op.operands) if operand in names]
        if not places:
            continue
        if op.opcode == "bitcast":
            names.add(name)
        elif op.opcode in _CUTS and places == [0]:
            total += _size(op.type, everywhere=True)
        elif op.opcode == "fusion":
            inner = computations[called(op)[0]]
            total += sum(_read(computations, inner, place) for place in places)
        elif op.opcode != "dynamic-update-slice" or places != [0]:
            return _size(fused[op.operands[places[0]]].type, everywhere=True)
    return total


def _written(fused: Computation, result: str) -> int:
    """Bytes that a fusion writes: of what it changes in place, the part that changes."""
    root = list(fused.values())[-1]
    parts = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for part, type_ in zip(parts, _arrays(result), strict=False):
        while part.opcode == "bitcast" and part.operands[0] in fused:
            part = fused[part.operands[0]]
        if part.opcode == "dynamic-update-slice":
            total += _size(fused[part.operands[1]].type, everywhere=True)
        else:
            total += _size(type_)
    return total


def _arrays(type_: str) -> list[str]:
    """The arrays of a type, which may be a tuple, with their layouts."""
    return [found[0] for found in _ARRAY.finditer(type_)]


def _size(type_: str, *, everywhere: bool = False) -> int:
    """Bytes of the arrays of a type that lie in the device's memory, or `everywhere`."""
    return sum(array_bytes(x) for x in _arrays(type_) if everywhere or "S(1)" not in x)
