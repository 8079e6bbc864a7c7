"""What a training step holds in the memory of one device: compiled, or estimated from its types."""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from capjax.planning.flops import num_parts, subprograms
from capjax.training.state import TrainState

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


class Memory(NamedTuple):
    """Bytes of one device.

    Attributes:
      parameters, optimizer, average, batch: exact, from shapes and shardings.
      padding: what the compiler's layouts add to those.
      temporaries: activations, gradients and all else that lives within a step.
      code: of the program itself.
    """

    parameters: int
    optimizer: int
    average: int
    batch: int
    padding: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(self)

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.parameters + self.optimizer + self.average


def device_bytes(tree: Any) -> int:
    """Bytes of one device's part of arrays or of their types, by their shardings."""
    parts = (x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(tree))
    sizes = (x.dtype.itemsize for x in jax.tree.leaves(tree))
    return sum(math.prod(part) * size for part, size in zip(parts, sizes, strict=True))


def argument_memory(state: TrainState, batch: Any) -> Memory:
    """What a step is given, exactly; 0 for all else."""
    average = 0 if state.ema is None else device_bytes(state.ema)
    optimizer = device_bytes(state.opt_state)
    return Memory(device_bytes(state.params), optimizer, average, device_bytes(batch), 0, 0, 0)


def compiled_memory(compiled: Any, state: TrainState, batch: Any) -> Memory:
    """Of a step compiled for devices; `state` and `batch` are those that it was compiled for."""
    stats = compiled.memory_analysis()
    exact = argument_memory(state, batch)
    # The new state takes the place of the old; what else comes out are scalars.
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return exact._replace(
        padding=stats.argument_size_in_bytes + results - exact.peak,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def estimated_memory(program: ClosedJaxpr, state: TrainState, batch: Any) -> Memory:
    """Of a traced step (`jitted.trace(state, batch).jaxpr`), without compiling it.

    The temporaries are the most bytes that live at once if the equations run in the order of the
    trace and each result is held until its last use; the new state, which takes the place of the
    old, is not counted. Compilers fuse some of it away, and add copies and layouts of their own.
    """
    exact = argument_memory(state, batch)
    results = device_bytes([x for x in (state.params, state.opt_state, state.ema) if x is not None])
    return exact._replace(temporaries=max(live_bytes(program.jaxpr) - results, 0))


def bytes_wanted(message: str, arguments: int) -> int | None:
    """What a program that the compiler refuses needs, from its words; None where they are others.

    It tells of all memory, or of the temporaries alone: then the `arguments` (bytes) come on top.
    """
    number = r"([\d.]+)([KMG]?)"
    if found := re.search(rf"Used {number} of [\d.]+[KMG]? hbm", message):
        return round(float(found[1]) * _UNITS[found[2]])
    if found := re.search(rf"required for HLO temporaries \({number}\) exceeds", message):
        return arguments + round(float(found[1]) * _UNITS[found[2]])
    return None


def live_bytes(program: Jaxpr) -> int:
    """The most bytes of one device that the program's own results take at once."""
    last_use: dict[Any, int] = {}
    for number, equation in enumerate(program.eqns):
        for variable in equation.invars:
            if not isinstance(variable, Literal):
                last_use[variable] = number
    last_use |= {x: len(program.eqns) for x in program.outvars if not isinstance(x, Literal)}
    held: dict[Any, int] = {}
    now = most = 0
    for number, equation in enumerate(program.eqns):
        inside = max((live_bytes(part) for part in subprograms(equation)), default=0)
        for variable in equation.outvars:
            if variable in last_use:
                held[variable] = _bytes(variable)
                now += held[variable]
        most = max(most, now + inside)
        for variable in {x for x in equation.invars if not isinstance(x, Literal)}:
            if last_use[variable] == number:
                now -= held.pop(variable, 0)
    return most


def _bytes(variable: Any) -> int:
    aval = variable.aval
    if not hasattr(aval, "shape") or not hasattr(aval, "dtype"):
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize // num_parts([variable])
