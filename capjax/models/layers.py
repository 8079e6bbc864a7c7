"""The layers of a transformer, and the one way a parameter is made and used.

Parameters are float32 and stored as their `PartitionSpec` says; `use` casts one to the compute type
and gathers it over `fsdp` right where it is needed. The backward passes of LayerNorm and GELU are
written out, so that each keeps one array in the compute type and nothing in float32.
Numerics (eps 1e-6, tanh GELU, query scaled by 1/sqrt(K)) are those of big_vision's CapPa.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.nn import initializers
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from capjax.dims import Array, Float, Int, PRNGKeyArray
from capjax.mesh import (
    BATCH,
    act_BLD,
    bias_F,
    embedding_VD,
    gathered,
    kernel_DF,
    kernel_FD,
    out_sharding,
    replicated,
    reshard,
)

Initializer = Callable[..., Array]


def parameter(
    init: Initializer, key: PRNGKeyArray, shape: tuple[int, ...], spec: P = replicated
) -> nnx.Param:
    """A float32 parameter, drawn already laid out as `spec` where a mesh is set."""
    value = init(key, shape, jnp.float32, out_sharding=out_sharding(spec))
    return nnx.Param(value, spec=spec)


def use(param: nnx.Param, dtype: DTypeLike) -> Array:
    """The parameter in the compute type, whole but for its tensor-parallel axis."""
    return reshard(param[...].astype(dtype), gathered(param.get_metadata("spec")))


def xavier_uniform(num_out: int = 1, separate: int | None = None) -> Initializer:
    """Glorot's uniform: the last `num_out` axes are outputs.

    Along the axis `separate`, one of these, there are several kernels, each with its own fans.
    """
    return _scaled("fan_avg", "uniform", num_out, separate)


def lecun_normal(num_out: int = 1, separate: int | None = None) -> Initializer:
    """Truncated normal of variance 1/fan_in; the axes as in `xavier_uniform`."""
    return _scaled("fan_in", "truncated_normal", num_out, separate)


def _scaled(mode, distribution, num_out, separate) -> Initializer:
    def init(key, shape, dtype, out_sharding=None):
        num_in = len(shape) - num_out
        return initializers.variance_scaling(
            1.0,
            mode,
            distribution,
            in_axis=tuple(range(num_in)),
            out_axis=tuple(i for i in range(num_in, len(shape)) if i != separate),
            batch_axis=() if separate is None else (separate,),
        )(key, shape, dtype, out_sharding=out_sharding)

    return init


@jax.custom_vjp
def layer_norm(x_BLD: Array, scale_D: Array, bias_D: Array | None) -> Array:
    """LayerNorm over the last axis: statistics in float32, result in the type of the input."""
    return _layer_norm_forward(x_BLD, scale_D, bias_D)[0]


def _layer_norm_forward(x_BLD, scale_D, bias_D):
    x32_BLD = x_BLD.astype(jnp.float32)
    mean_BL1 = jnp.mean(x32_BLD, -1, keepdims=True)
    variance_BL1 = jnp.mean(jnp.square(x32_BLD - mean_BL1), -1, keepdims=True)
    rstd_BL1 = lax.rsqrt(variance_BL1 + 1e-6)
    y_BLD = (x32_BLD - mean_BL1) * rstd_BL1 * scale_D[None, None, :]
    if bias_D is not None:
        y_BLD += bias_D[None, None, :]
    return y_BLD.astype(x_BLD.dtype), (x_BLD, mean_BL1, rstd_BL1, scale_D, bias_D)


def _layer_norm_backward(residuals, dy_BLD):
    x_BLD, mean_BL1, rstd_BL1, scale_D, bias_D = residuals
    dy_BLD = dy_BLD.astype(jnp.float32)
    normal_BLD = (x_BLD.astype(jnp.float32) - mean_BL1) * rstd_BL1
    dnormal_BLD = dy_BLD * scale_D[None, None, :]
    dx_BLD = rstd_BL1 * (
        dnormal_BLD
        - jnp.mean(dnormal_BLD, -1, keepdims=True)
        - normal_BLD * jnp.mean(dnormal_BLD * normal_BLD, -1, keepdims=True)
    )
    dbias_D = None if bias_D is None else jnp.sum(dy_BLD, (0, 1))
    return dx_BLD.astype(x_BLD.dtype), jnp.sum(dy_BLD * normal_BLD, (0, 1)), dbias_D


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """GELU in its tanh approximation; only the input is kept for the backward pass."""
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + _gelu_tanh(x32))).astype(x.dtype)


def _gelu_tanh(x32):
    return jnp.tanh(math.sqrt(2 / math.pi) * (x32 + 0.044715 * x32**3))


def _gelu_backward(x, dy):
    x32 = x.astype(jnp.float32)
    tanh = _gelu_tanh(x32)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * jnp.square(x32))
    dx = 0.5 * (1 + tanh) + 0.5 * x32 * (1 - jnp.square(tanh)) * slope
    return ((dy.astype(jnp.float32) * dx).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis."""

    def __init__(self, width: int, *, use_bias: bool = True):
        key = jax.random.key(0)  # not drawn from: ones and zeros
        self.scale = parameter(initializers.ones, key, (width,))
        self.bias = parameter(initializers.zeros, key, (width,)) if use_bias else None

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return layer_norm(x_BLD, self.scale[...], None if self.bias is None else self.bias[...])


class Projection(nnx.Module):
    """A kernel of shape `in_shape + out_shape`, and an optional bias of `out_shape`.

    Applied as one 2-D matmul, for which the compilers find a transposed gradient without copies.
    Of the input's and of the output's axes only the first may be split over `tensor`.
    """

    def __init__(
        self,
        key: PRNGKeyArray,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        spec: P,
        init: Initializer,
        *,
        use_bias: bool,
        bias_spec: P = replicated,
        bias_init: Initializer = initializers.zeros,
    ):
        kernel_key, bias_key = jax.random.split(key)
        self.kernel = parameter(init, kernel_key, in_shape + out_shape, spec)
        self.bias = parameter(bias_init, bias_key, out_shape, bias_spec) if use_bias else None
        self.num_in = len(in_shape)
        self.out_shape = out_shape
        spec = gathered(spec)
        self.in_axis, self.out_axis = spec[0], spec[self.num_in]

    def __call__(self, x: Array) -> Array:
        """(B, L, *in_shape) to (B, L, *out_shape)."""
        kernel = use(self.kernel, x.dtype)
        batch, length = x.shape[:2]
        num_in = math.prod(kernel.shape[: self.num_in])
        y_BF = jnp.dot(
            _reshape(x, (batch * length, num_in), P(BATCH, self.in_axis)),
            _reshape(kernel, (num_in, -1), P(self.in_axis, self.out_axis)),
            out_sharding=out_sharding(P(BATCH, self.out_axis)),
        )
        y = _reshape(y_BF, (batch, length, *self.out_shape), P(BATCH, None, self.out_axis))
        return y if self.bias is None else y + use(self.bias, x.dtype)[None, None]


def _reshape(x: Array, shape: tuple[int, ...], spec: P) -> Array:
    return x.reshape(shape, out_sharding=out_sharding(spec))


class Mlp(nnx.Module):
    """Two projections with a GELU between."""

    def __init__(self, key: PRNGKeyArray, width: int, hidden: int, *, use_bias: bool):
        up_key, down_key = jax.random.split(key)
        bias_init = initializers.normal(1e-6)
        self.up = Projection(
            up_key,
            (width,),
            (hidden,),
            kernel_DF,
            xavier_uniform(),
            use_bias=use_bias,
            bias_spec=bias_F,
            bias_init=bias_init,
        )
        self.down = Projection(
            down_key,
            (hidden,),
            (width,),
            kernel_FD,
            xavier_uniform(),
            use_bias=use_bias,
            bias_init=bias_init,
        )

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.down(gelu(self.up(x_BLD)))


class Embedding(nnx.Module):
    """A table of token vectors, N(0, 1), its rows padded to `num_stored` with zeros."""

    def __init__(self, key: PRNGKeyArray, num_rows: int, num_stored: int, width: int):
        def init(key, shape, dtype, out_sharding=None):
            table_VD = initializers.normal(1.0)(key, shape, dtype, out_sharding=out_sharding)
            return jnp.where(jnp.arange(num_stored)[:, None] < num_rows, table_VD, 0)

        self.embedding = parameter(init, key, (num_stored, width), embedding_VD)

    def __call__(self, tokens_BL: Int[Array, "B L"], dtype: DTypeLike) -> Float[Array, "B L D"]:
        # Every batch shard needs every row, so the table is gathered over both of its axes.
        table_VD = reshard(self.embedding[...].astype(dtype), P(None, None))
        return table_VD.at[tokens_BL].get(out_sharding=out_sharding(act_BLD))
