"""Muon on stacked and fused kernels: every layer's every projection orthogonalised by itself.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), through
`optax.contrib`; the scale of Liu et al., "Muon is Scalable for LLM Training" (2025), gives updates
the size of AdamW's, so that one learning rate and weight decay serve both.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.typing import DTypeLike
from optax import contrib

from capjax.training.layout import Layout

UPDATE_RMS = 0.2  # the root mean square of AdamW's updates, as Liu et al. measured it

# Kernels of the first and the last layers, which AdamW takes with all that is no matrix.
OUTER = re.compile(r"(.*/)?(patch_embedding|head|\w*projection)/kernel")


class MuonState(NamedTuple):
    """What Muon keeps of the hidden kernels, and AdamW of all other parameters."""

    muon: Any
    adam: Any


def scale_by_muon(
    layouts: Mapping[str, Layout],
    adam: optax.GradientTransformation,
    *,
    momentum: float,
    momentum_dtype: DTypeLike,
) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum for the hidden kernels, `adam` for the rest; arrays by name.

    Heads count as one matrix: a projection onto N heads of width K is orthogonalised as (D, N K).
    """
    axes = {name: _matrix_axes(name, x) for name, x in layouts.items() if _is_hidden(name)}
    dimensions = {name: contrib.MuonDimensionNumbers(*both) for name, both in axes.items()}
    muon = contrib.scale_by_muon(
        beta=momentum, mu_dtype=momentum_dtype, weight_dimension_numbers=dimensions
    )

    def scale(name: str) -> float:
        # An orthogonal matrix has entries of root mean square 1 / sqrt(its longer side).
        sides = [math.prod(layouts[name].sizes[i] for i in side) for side in axes[name]]
        return UPDATE_RMS * max(sides) ** 0.5

    def split(arrays: Any) -> tuple[dict, dict]:
        hidden = {name: x for name, x in arrays.items() if name in axes}
        return hidden, {name: x for name, x in arrays.items() if name not in axes}

    def init(params):
        hidden, others = split(params)
        return MuonState(muon.init(hidden), adam.init(others))

    def update(updates: Any, state: Any, params: Any = None):
        del params
        hidden, others = split(updates)
        results: Any = _auto_axes(muon.update, hidden, state.muon), adam.update(others, state.adam)
        (hidden, muon_state), (others, adam_state) = results
        hidden = {name: u * scale(name) for name, u in hidden.items()}
        return hidden | others, MuonState(muon_state, adam_state)

    return optax.GradientTransformation(init, update)


def _is_hidden(name: str) -> bool:
    return name.endswith("/kernel") and OUTER.fullmatch(name) is None


def _matrix_axes(name: str, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes that a kernel sums over, and those that it puts out."""
    num_in = len(layout.axes) - 1 if name.endswith("/out/kernel") else 1
    return layout.axes[:num_in], layout.axes[num_in:]


def _auto_axes(update: Callable, updates: Any, state: Any) -> Any:
    """`update`, with shardings left to the compiler within: it transposes and merges split axes."""
    if jax.sharding.get_abstract_mesh().empty:
        return update(updates, state)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
    automatic: Callable = jax.sharding.auto_axes(update, out_sharding=specs)
    return automatic(updates, state)
