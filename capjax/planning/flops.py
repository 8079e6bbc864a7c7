"""FLOPs of matrix products and convolutions in a traced program, as one device computes them.

Exact where XLA's own count is not: it counts the body of a loop once. What is computed again for
the backward pass is counted again. Elementwise work is left out.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.sharding import AxisType


def count_flops(jaxpr: ClosedJaxpr | Jaxpr, unknown_trips: int) -> float:
    """FLOPs (2mnk) of one device in one run of the program (`jitted.trace(…).jaxpr`).

    By the shardings in the types a product is split over the mesh axes that its operands and its
    result are split over, and repeated along the others; over axes of type Auto, where the types do
    not tell, it is taken to be split. A loop whose trips the program does not tell (`while`) runs
    `unknown_trips` times; of the branches of a conditional the dearest counts.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        inside = [count_flops(part, unknown_trips) for part in subprograms(equation)]
        if equation.primitive.name == "cond":
            total += max(inside)
        else:
            total += trips(equation, unknown_trips) * sum(inside)
        total += _flops(equation) / num_parts(equation.invars + equation.outvars)
    return total


def subprograms(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs that an equation runs: a loop's body, a call's, a kernel's."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part


def trips(equation: JaxprEqn, unknown_trips: int) -> int:
    """How often one run of the equation runs its `subprograms`."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return params["length"]
    if name == "while":
        return unknown_trips
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def num_parts(variables: Any) -> int:
    """Into how many parts the arrays, taken together, are split over the mesh."""
    axes: dict[str, int] = {}
    for variable in variables:
        sharding = getattr(variable.aval, "sharding", None)
        if sharding is None:
            continue
        mesh = sharding.mesh
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
            if kind == AxisType.Auto:
                axes[axis] = mesh.shape[axis]
        for entry in sharding.spec:
            for axis in entry if isinstance(entry, tuple) else (entry,):
                if axis is not None:
                    axes[axis] = mesh.shape[axis]
    return math.prod(axes.values())


def _flops(equation: JaxprEqn) -> float:
    """Of the whole product, on all devices; 0 for what is none."""
    types: list[Any] = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        summed = math.prod(types[0].shape[axis] for axis in contracted)
    elif equation.primitive.name == "conv_general_dilated":
        kernel = types[1].shape
        outputs = equation.params["dimension_numbers"].rhs_spec[0]
        # The kernel holds the channels of one group only.
        summed = math.prod(kernel) // kernel[outputs]
    else:
        return 0.0
    return 2.0 * math.prod(types[-1].shape) * summed
