"""The layers of a transformer but attention; by default with the numerics of big_vision's CapPa.

The backward passes of LayerNorm and of the activations are written out, so that each keeps one
array in the compute type and nothing in float32.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from capjax.dims import Array, Float, Int
from capjax.mesh import (
    act_BLD,
    embedding_VD,
    gathered,
    kernel_DF,
    kernel_FD,
    out_sharding,
    platform,
    reshard,
)
from capjax.models.parameters import (
    Law,
    broadcast,
    normal,
    ones,
    parameter,
    use,
    xavier_uniform,
    zeros,
)
from capjax.models.stack import MATMUL


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x_BLD: Array, scale_D: Array, bias_D: Array | None, eps: float = 1e-6) -> Array:
    """LayerNorm over the last axis: statistics in float32, result in the type of the input."""
    return _layer_norm_forward(x_BLD, scale_D, bias_D, eps)[0]


def _layer_norm_forward(x_BLD, scale_D, bias_D, eps):
    x32_BLD = x_BLD.astype(jnp.float32)
    mean_BL1 = jnp.mean(x32_BLD, -1, keepdims=True)
    variance_BL1 = jnp.mean(jnp.square(x32_BLD - mean_BL1), -1, keepdims=True)
    rstd_BL1 = lax.rsqrt(variance_BL1 + eps)
    y_BLD = (x32_BLD - mean_BL1) * rstd_BL1 * scale_D[None, None, :]
    if bias_D is not None:
        y_BLD += bias_D[None, None, :]
    return y_BLD.astype(x_BLD.dtype), (x_BLD, mean_BL1, rstd_BL1, scale_D, bias_D)


def _layer_norm_backward(eps, residuals, dy_BLD):
    del eps  # it is in the deviations kept
    x_BLD, mean_BL1, rstd_BL1, scale_D, bias_D = residuals

    def in_float32(x_BLD, dy_BLD):
        return (x_BLD.astype(jnp.float32) - mean_BL1) * rstd_BL1, dy_BLD.astype(jnp.float32)

    normal_BLD, dy32_BLD = in_float32(x_BLD, dy_BLD)
    dnormal_BLD = dy32_BLD * scale_D[None, None, :]
    dx_BLD = rstd_BL1 * (
        dnormal_BLD
        - jnp.mean(dnormal_BLD, -1, keepdims=True)
        - normal_BLD * jnp.mean(dnormal_BLD * normal_BLD, -1, keepdims=True)
    )
    if platform() == "gpu":  # anew for the sums over rows: or both are written, in float32, between
        normal_BLD, dy32_BLD = in_float32(*lax.optimization_barrier((x_BLD, dy_BLD)))
    dscale_D = jnp.sum(dy32_BLD * normal_BLD, (0, 1))
    dbias_D = None if bias_D is None else jnp.sum(dy32_BLD, (0, 1))
    return dx_BLD.astype(x_BLD.dtype), dscale_D, dbias_D


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _elementwise(value: Callable, slope: Callable) -> Callable[[Array, Array | None], Array]:
    """`value` of x + bias in float32; for the backward pass, by `slope`, it keeps x and the bias.

    The bias, of x's last axis, may be None. Its gradient is formed in float32.
    """

    def biased(x, bias):
        if bias is None:
            return x
        bias = bias.reshape((1,) * (x.ndim - 1) + bias.shape)
        return x + broadcast(bias, x.shape, jax.typeof(x).sharding.spec)

    @jax.custom_vjp
    def function(x: Array, bias: Array | None) -> Array:
        return value(biased(x, bias).astype(jnp.float32)).astype(x.dtype)

    def backward(residuals, dy):
        # The barriers: or what `value` computed, the sum, and the product are written, in float32.
        x, bias = lax.optimization_barrier(residuals)
        dx = dy.astype(jnp.float32) * slope(biased(x, bias).astype(jnp.float32))
        dx = lax.optimization_barrier(dx.astype(x.dtype))
        if bias is None:
            return dx, None
        return dx, jnp.sum(dx, range(x.ndim - 1), dtype=jnp.float32).astype(bias.dtype)

    function.defvjp(lambda x, bias: (function(x, bias), (x, bias)), backward)
    return function


def _tanh(x):
    return jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _gelu_tanh_slope(x):
    tanh = _tanh(x)
    inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * jnp.square(x))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - jnp.square(tanh)) * inner


def _gelu_slope(x):
    return jax.scipy.stats.norm.cdf(x) + x * jax.scipy.stats.norm.pdf(x)


def _quick_gelu_slope(x):
    gate = jax.nn.sigmoid(1.702 * x)
    return gate + 1.702 * x * gate * (1 - gate)


# GELU in its tanh approximation, as it is defined, and in the approximation by a sigmoid that
# OpenAI's CLIP was trained with.
ACTIVATIONS = {
    "gelu_tanh": _elementwise(lambda x: 0.5 * x * (1 + _tanh(x)), _gelu_tanh_slope),
    "gelu": _elementwise(lambda x: x * jax.scipy.stats.norm.cdf(x), _gelu_slope),
    "quick_gelu": _elementwise(lambda x: x * jax.nn.sigmoid(1.702 * x), _quick_gelu_slope),
}


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis."""

    def __init__(self, width: int, *, use_bias: bool = True, eps: float = 1e-6):
        self.scale = parameter(ones, (width,))
        self.bias = parameter(zeros, (width,)) if use_bias else None
        self.eps = eps

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        bias_D = None if self.bias is None else self.bias[...]
        return layer_norm(x_BLD, self.scale[...], bias_D, self.eps)


class Projection(nnx.Module):
    """A kernel of shape `in_shape + out_shape`, and an optional bias of `out_shape`.

    Applied as one 2-D matmul, for which the compilers find a transposed gradient without copies.
    Of the input's and of the output's axes only the first may be split over `tensor`.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        spec: P,
        law: Law,
        *,
        use_bias: bool,
        bias_law: Law = zeros,
    ):
        num_in = len(in_shape)
        self.kernel = parameter(law, in_shape + out_shape, spec)
        bias_spec = gathered(P(*spec[num_in:]))
        self.bias = parameter(bias_law, out_shape, bias_spec) if use_bias else None
        self.in_shape, self.out_shape = in_shape, out_shape
        self.spec = spec
        self.in_axis, self.out_axis = gathered(spec)[0], bias_spec[0]

    def __call__(self, x: Array) -> Array:
        """(B, L, *in_shape) to (B, L, *out_shape)."""
        y = self.product(x)
        if self.bias is None:
            return y
        spec = jax.typeof(y).sharding.spec
        return y + broadcast(use(self.bias, x.dtype)[None, None], y.shape, spec)

    def product(self, x: Array) -> Array:
        """`__call__` without the bias."""
        batch, length = x.shape[:2]
        rows = jax.typeof(x).sharding.spec[0]  # not split where a single row is the same for all
        x_RD = _reshape(x, (batch * length, math.prod(self.in_shape)), P(rows, self.in_axis))
        y_RF = _matmul(self.spec, len(self.in_shape), x_RD, self.kernel[...])
        y_RF = checkpoint_name(y_RF, MATMUL)
        return _reshape(y_RF, (batch, length, *self.out_shape), P(rows, None, self.out_axis))


def _reshape(x: Array, shape: tuple[int, ...], spec: P) -> Array:
    return x.reshape(shape, out_sharding=out_sharding(spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(spec: P, num_in: int, x_RD: Array, kernel: Array) -> Array:
    """R rows times a kernel with `num_in` input axes, stored as `spec`: (R, D) to (R, F).

    The kernel's gradient is asked for as the kernel is stored, so each device is sent its part of
    the sum over devices. Left to itself, the compiler sums it whole on every device, and cuts.
    """
    rows = jax.typeof(x_RD).sharding.spec[0]
    _, out_axis = _merged(gathered(spec), num_in)
    kernel_DF = _used(spec, num_in, x_RD, kernel)
    return _dot(x_RD, kernel_DF, P(rows, out_axis))


def _dot(x: Array, y: Array, spec: P) -> Array:
    """The product, in the type of its factors, laid out as `spec`."""
    # XLA:CPU is slow at products straight into bfloat16 (docs/performance.md, "Decoding"). Rounded
    # afterwards they are the same: sums are of float32 either way.
    wide = jnp.float32 if platform() == "cpu" else None
    product = jnp.dot(x, y, preferred_element_type=wide, out_sharding=out_sharding(spec))
    return product.astype(x.dtype)


def _matmul_forward(spec, num_in, x_RD, kernel):
    return _matmul(spec, num_in, x_RD, kernel), (x_RD, kernel)  # as stored: gathered once more


def _matmul_backward(spec, num_in, residuals, dy_RF):
    x_RD, kernel = residuals
    rows = jax.typeof(x_RD).sharding.spec[0]
    in_axis, _ = _merged(gathered(spec), num_in)
    kernel_DF = _used(spec, num_in, x_RD, kernel)
    dx_RD = _dot(dy_RF, kernel_DF.T, P(rows, in_axis))
    stored = _merged(spec, num_in)
    if stored[1] == "fsdp":  # formed transposed: a compiler deals out the parts of the first axis
        dkernel_DF = _dot(dy_RF.T, x_RD, P(stored[1], stored[0])).T
    else:
        dkernel_DF = _dot(x_RD.T, dy_RF, stored)
    return dx_RD, _reshape(dkernel_DF, kernel.shape, spec).astype(kernel.dtype)


def _used(spec: P, num_in: int, x_RD: Array, kernel: Array) -> Array:
    """The kernel in the type of the rows, (D, F), whole but for its tensor-parallel axis."""
    kernel = reshard(kernel.astype(x_RD.dtype), gathered(spec))
    return _reshape(kernel, (x_RD.shape[1], -1), _merged(gathered(spec), num_in))


def _merged(spec: P, num_in: int) -> P:
    """The spec of a kernel whose input axes are one, and its output axes."""
    return P(*(next(filter(None, axes), None) for axes in (spec[:num_in], spec[num_in:])))


_matmul.defvjp(_matmul_forward, _matmul_backward)


class Mlp(nnx.Module):
    """Two projections with one of `ACTIVATIONS` between."""

    def __init__(self, width: int, hidden: int, *, use_bias: bool, activation: str = "gelu_tanh"):
        law, bias_law = xavier_uniform(width, hidden), normal(1e-6)
        self.up = Projection(
            (width,), (hidden,), kernel_DF, law, use_bias=use_bias, bias_law=bias_law
        )
        self.down = Projection(
            (hidden,), (width,), kernel_FD, law, use_bias=use_bias, bias_law=bias_law
        )
        self.activation = activation

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        bias_F = None if self.up.bias is None else use(self.up.bias, x_BLD.dtype)
        return self.down(ACTIVATIONS[self.activation](self.up.product(x_BLD), bias_F))


class Embedding(nnx.Module):
    """A table of token vectors, N(0, scale), its rows padded to `num_stored` with zeros."""

    def __init__(self, num_rows: int, num_stored: int, width: int, scale: float = 1.0):
        self.embedding = parameter(normal(scale, num_rows), (num_stored, width), embedding_VD)

    def __call__(self, tokens_BL: Int[Array, "B L"], dtype: DTypeLike) -> Float[Array, "B L D"]:
        # Every batch shard needs every row, so the table is gathered over both of its axes; and in
        # float32, in which its gradient is then summed: a batch has some tokens many times.
        table_VD = reshard(self.embedding[...], P(None, None))
        return table_VD.at[tokens_BL].get(out_sharding=out_sharding(act_BLD)).astype(dtype)
