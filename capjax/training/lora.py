"""Low-rank adaptation: kernels stay as they are, and small products are trained on top of them.

A kernel W of D inputs and F outputs is used as W + alpha / rank * A B, with A [D, rank] and B
[rank, F]. Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).

The factors live beside what they adapt: `params["lora"]` is a nested dict with the names of the
adapted kernels, each of which holds `a` and `b`. Nothing but `merge` knows of them: models,
evaluation and export work on merged parameters.

A kernel's axes are those of a layer each: input axes, rank for `a`; rank, output axes for `b`. The
axis that numbers the layers of a stack leads all three. Letters beyond `capjax.dims`: R rank.
"""

import dataclasses
import math
import re
import string

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from capjax.dims import Array, Params, PRNGKeyArray
from capjax.errors import UserError
from capjax.mesh import out_sharding
from capjax.models.parameters import normal, zeros
from capjax.training.patterns import by_name, matching, nested

LORA = "lora"  # the entry of the parameters that holds the factors
# Layers whose kernel has one axis of output and several of input; of all others it is the reverse.
JOINING = ("out", "patch_embedding")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """What is adapted, and how.

    Attributes:
      rank: of the products; 0: nothing is adapted, and all parameters train as ever.
      alpha: the products are scaled by alpha / rank.
      targets: patterns of the kernels that are adapted (see `OptimizerConfig`); a pattern of what
        stands above them chooses all of its kernels.
      train: patterns of other parameters that train too; none: only the factors do.
      init_std: standard deviation of the entries of A, B being zeros; 0: 1 / rank, as Hugging
        Face's PEFT draws its Gaussian. No Detail Left Behind (Gaur et al. 2024) has 1.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = (".*attention",)
    train: tuple[str, ...] = ()
    init_std: float = 0.0

    def __post_init__(self):
        if self.rank < 0:
            raise UserError(f"lora.rank={self.rank}: expected 0 (none) or more")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha={self.alpha}: expected more than 0")
        if not 0 <= self.init_std < math.inf:
            raise UserError(f"lora.init_std={self.init_std}: expected 0 (1 / rank) or more")
        if self.rank and not self.targets:
            raise UserError(
                f"lora.targets is empty with lora.rank={self.rank}: name kernels to adapt, such as "
                "('.*attention',), or set lora.rank=0"
            )

    @property
    def scale(self) -> float:
        """What the products are multiplied by; 0 where nothing is adapted."""
        return self.alpha / self.rank if self.rank else 0.0


def with_lora(params: Params, key: PRNGKeyArray, settings: LoRA) -> Params:
    """`params` with factors of every target beside them, split over the mesh as the kernels are.

    The same numbers on any mesh. Unchanged where the rank is 0. Raises `UserError` for a target
    that is no kernel.
    """
    if not settings.rank:
        return params
    kernels = by_name(params)
    targets = target_names(params, settings)
    law = normal(settings.init_std or 1 / settings.rank)
    factors = {}
    for name, subkey in zip(targets, jax.random.split(key, len(targets)), strict=True):
        kernel = kernels[name]
        a, b = factor_shapes(name, kernel.shape, settings.rank)
        spec_a, spec_b = factor_specs(name, kernel)
        factors[f"{name}/a"] = law.draw(subkey, a, spec_a)
        factors[f"{name}/b"] = zeros.draw(subkey, b, spec_b)
    return params | {LORA: nested(factors)}


def merge(params: Params, scale: float) -> Params:
    """Plain parameters: every adapted kernel with `scale` times its product added.

    Differentiable in kernels and factors; within a mesh a merged kernel is split as the kernel is.
    A scale of 0 gives the kernels as they were before adaptation. `params` without an entry "lora"
    are returned as they are.
    """
    if LORA not in params:
        return params
    plain = {name: x for name, x in params.items() if name != LORA}
    if not scale:
        return plain
    leaves = by_name(plain)
    factors = by_name(params[LORA])
    for name in {name.rpartition("/")[0] for name in factors}:
        leaves[name] = leaves[name] + scale * _product(
            factors[f"{name}/a"], factors[f"{name}/b"], leaves[name]
        )
    return jax.tree.unflatten(jax.tree.structure(plain), list(leaves.values()))


def target_names(params: Params, settings: LoRA) -> list[str]:
    """The kernels that are adapted. Raises `UserError` for a pattern that matches none."""
    kernels = [n for n, x in by_name(params).items() if n.endswith("/kernel") and len(x.shape) > 1]
    return sorted(matching(settings.targets, kernels, "lora.targets"))


def held_patterns(params: Params, settings: LoRA) -> tuple[str, ...]:
    """Patterns, for `OptimizerConfig.freeze`, of what does not train; none where the rank is 0."""
    if not settings.rank:
        return ()
    base = [name for name in by_name(params) if not name.startswith(f"{LORA}/")]
    trained = matching(settings.train, base, "lora.train")
    return tuple(re.escape(name) for name in base if name not in trained)


def factor_shapes(
    name: str, shape: tuple[int, ...], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `a` and `b` for a kernel of this name and shape."""
    layers, inputs, outputs = _axes(name, shape)
    return (*layers, *inputs, rank), (*layers, rank, *outputs)


def factor_specs(name: str, kernel: Array) -> tuple[P, P]:
    """How `a` and `b` are split: along the kernel's axes as it is, and not along the rank."""
    spec = jax.typeof(kernel).sharding.spec
    spec = (*spec, *(None,) * (kernel.ndim - len(spec)))
    layers, inputs, outputs = _axes(name, spec)
    return P(*layers, *inputs, None), P(*layers, None, *outputs)


def _axes(name: str, axes: tuple) -> tuple[tuple, tuple, tuple]:
    """What belongs to a kernel's axes, apart: of layers, of input, of output."""
    *parents, layer, _ = name.split("/")
    start = int(any(parent.endswith("blocks") for parent in parents))
    cut = len(axes) - 1 if layer in JOINING else start + 1
    return axes[:start], axes[start:cut], axes[cut:]


def _product(a: Array, b: Array, kernel: Array) -> Array:
    """a @ b over the rank, layer by layer, laid out as `kernel`."""
    axes, cut = string.ascii_lowercase[: kernel.ndim], a.ndim - 1
    layers = axes[: a.ndim + b.ndim - 2 - kernel.ndim]
    equation = f"{axes[:cut]}R,{layers}R{axes[cut:]}->{axes}"
    return jnp.einsum(equation, a, b, out_sharding=out_sharding(jax.typeof(kernel).sharding.spec))
