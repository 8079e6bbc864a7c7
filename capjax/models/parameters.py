"""Parameters: declared by the modules with their law, drawn all at once, cast and gathered at use.

Modules are built without drawing anything, so that a model of any size is described in
milliseconds; `functional.init` then draws every parameter, a whole stack of layers in one call.
That, rather than a `vmap` over blocks that draw for themselves, compiles several times faster.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from capjax.dims import Array, PRNGKeyArray
from capjax.mesh import gathered, out_sharding, replicated, reshard


@dataclasses.dataclass(frozen=True)
class Law:
    """How a parameter's entries are drawn, independently of each other.

    Attributes:
      scale: standard deviation; the value itself of a constant.
      num_rows: where given, the rows after these are zero: padding.
    """

    kind: Literal["constant", "normal", "truncated_normal", "uniform"]
    scale: float
    num_rows: int | None = None

    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...], spec: P) -> Array:
        """A float32 array, laid out as `spec` where a mesh is set and the same on any mesh."""
        if self.kind == "constant":
            return jnp.full(shape, self.scale, jnp.float32, out_sharding=out_sharding(spec))
        merged, merged_spec = _merge_axes(shape, out_sharding(spec) or P())
        sharding = out_sharding(merged_spec)
        match self.kind:
            case "normal":
                x = jax.random.normal(key, merged, out_sharding=sharding)
            case "truncated_normal":
                x = jax.random.truncated_normal(key, -2.0, 2.0, merged, out_sharding=sharding)
                x /= 0.87962566103423978  # the standard deviation that is left after truncation
            case "uniform":
                x = jax.random.uniform(key, merged, minval=-1.0, maxval=1.0, out_sharding=sharding)
                x *= 3**0.5
        x = self.scale * x.reshape(shape, out_sharding=out_sharding(spec))
        if self.num_rows is None:
            return x
        return jnp.where(jnp.arange(shape[0])[:, None] < self.num_rows, x, 0)


def _merge_axes(shape: tuple[int, ...], spec: P) -> tuple[tuple[int, ...], P]:
    """Joins each axis that is not split to the one before it.

    A draw depends on an entry's place in row-major order alone, and XLA takes seconds to compile
    random bits over five axes where it takes a fraction of one over a single axis.
    """
    axes = (*spec, *(None,) * (len(shape) - len(spec)))
    sizes: list[int] = []
    names: list[str | None] = []
    for size, axis in zip(shape, axes, strict=True):
        if sizes and axis is None:
            sizes[-1] *= size
        else:
            sizes.append(size)
            names.append(axis)
    return tuple(sizes), P(*names)


zeros = Law("constant", 0.0)
ones = Law("constant", 1.0)


def normal(scale: float, num_rows: int | None = None) -> Law:
    """Normal of standard deviation `scale`."""
    return Law("normal", scale, num_rows)


def lecun_normal(num_in: int, num_out: int) -> Law:
    """Truncated normal of variance 1/fan_in."""
    del num_out
    return Law("truncated_normal", num_in**-0.5)


def xavier_uniform(num_in: int, num_out: int) -> Law:
    """Glorot's uniform, of variance 2 / (fan_in + fan_out)."""
    return Law("uniform", (2 / (num_in + num_out)) ** 0.5)


def parameter(
    law: Law,
    shape: tuple[int, ...],
    spec: P = replicated,
    *,
    used: tuple[int, ...] | None = None,
) -> nnx.Param:
    """Declares a float32 parameter, stored as `spec` says.

    `used` is the shape of the part that is in use, where what lies beyond it is padding; of a law
    with `num_rows` that is known.
    """
    if used is None:
        used = shape if law.num_rows is None else (law.num_rows, *shape[1:])
    value = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nnx.Param(value, law=law, spec=spec, used=used)


def use(param: nnx.Param, dtype: DTypeLike) -> Array:
    """The parameter in the compute type, whole but for its tensor-parallel axis."""
    return reshard(param[...].astype(dtype), gathered(param.get_metadata("spec")))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def broadcast(x: Array, shape: tuple[int, ...], spec: P) -> Array:
    """`jnp.broadcast_to`, whose gradient, a sum over many rows, is formed in float32.

    In bfloat16 a sum stands still from 256 times its terms on.
    """
    return jnp.broadcast_to(x, shape, out_sharding=out_sharding(spec))


def _broadcast_forward(x, shape, spec):
    return broadcast(x, shape, spec), x


def _broadcast_backward(shape, spec, x, slope):
    axes = tuple(axis for axis, size in enumerate(x.shape) if size != shape[axis])
    if axes == (0,) and x.ndim > 2:
        # As a product with ones: for a sum over it, XLA would store the batch as the last axis, and
        # with it, on GPUs, every activation of the network.
        rows = out_sharding(P(spec[0]))
        ones_B = jnp.broadcast_to(jnp.ones((), slope.dtype), shape[:1], out_sharding=rows)
        total = jnp.einsum(
            "b,b...->...",
            ones_B,
            slope,
            preferred_element_type=jnp.float32,
            out_sharding=out_sharding(P(*spec[1:])),
        )[None]
    else:
        total = jnp.sum(slope, axes, dtype=jnp.float32, keepdims=True)
    return (total.astype(x.dtype),)


broadcast.defvjp(_broadcast_forward, _broadcast_backward)
