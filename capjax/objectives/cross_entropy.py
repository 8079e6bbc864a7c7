"""Cross entropy behind a linear output layer, without ever holding the (B, L, V) logits.

The logits exist for one chunk of tokens at a time, in float32. Padding tokens are sorted to the
end and whole chunks of them are skipped, so the work follows the real tokens, not the text length.
On a mesh each device walks over its own tokens: the kernel is gathered over `fsdp` once, before
the first chunk, its gradient is summed over the devices once, after the last, and cut over `fsdp`
again; a vocabulary split over `tensor` stays split.

Letters beyond `capjax.dims`: T tokens (those of one device, B and L flattened), C tokens of a
chunk, V here the columns of one device.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Float, Int
from capjax.mesh import BATCH, act_BL, act_BLD, reshard

# More chunks need less memory (about 2 / NUM_CHUNKS of the logits), but make thinner products.
NUM_CHUNKS = 8


class Split(NamedTuple):
    """How one device's part of rows and head was cut from the whole."""

    batch_axes: tuple[str, ...] = ()  # the mesh axes over which the rows are split
    vocab_axis: str | None = None  # the one over which V is split


class _Settings(NamedTuple):
    vocab_size: int
    label_smoothing: float
    z_loss: float
    chunk: int | None  # tokens
    batch_axes: tuple[str, ...] = ()  # as in `Split`
    vocab_axis: str | None = None


def token_nll(
    hidden_BLE: Float[Array, "B L E"],
    kernel_EV: Float[Array, "E V"],
    bias_V: Float[Array, "V"],
    labels_BL: Int[Array, "B L"],
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> Float[Array, "B L"]:
    """-log p(label) in nats, float32, and 0 where the label is padding (id 0).

    Columns from `vocab_size` on are padding and take no part. With label smoothing s the target is
    1 - s at the label and s / (vocab_size - 1) at every other id. Products run in the type of
    `hidden_BLE` and sum in float32. `chunk` is in tokens (default: an eighth of a device's).

    Differentiable for any cotangent: the backward pass computes the logits again, four matrix
    products in all. Where the weights are known beforehand, `weighted_nll` needs three.
    """
    settings = _Settings(vocab_size, label_smoothing, 0.0, chunk)
    rows = (labels_BL,)
    walk = functools.partial(_flat, _plain, settings)
    return per_device(walk, hidden_BLE, kernel_EV, bias_V, rows)[1]


def weighted_nll(
    hidden_BLE: Float[Array, "B L E"],
    kernel_EV: Float[Array, "E V"],
    bias_V: Float[Array, "V"],
    labels_BL: Int[Array, "B L"],
    weights_BL: Float[Array, "B L"],
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B L"]]:
    """(sum of weights * cost, nll_BL), nll as `token_nll`; the second carries no gradient.

    The cost of a token is nll + `z_loss` * logsumexp(logits)^2, which keeps the logits near those
    of a normalised distribution (PaLM, Chowdhery et al. 2022). As the weights are known, the
    gradients are formed while a chunk's logits are at hand: three matrix products in all.
    """
    settings = _Settings(vocab_size, label_smoothing, z_loss, chunk)
    rows = (labels_BL, weights_BL)
    walk = functools.partial(_flat, _weighted, settings)
    return per_device(walk, hidden_BLE, kernel_EV, bias_V, rows)


def per_device(
    function: Callable,
    hidden_BLE: Float[Array, "B L E"],
    kernel_EV: Float[Array, "E V"],
    bias_V: Float[Array, "V"],
    rows: tuple[Array, ...],
) -> tuple[Any, Float[Array, "B L ..."]]:
    """`function` of each device's rows: (its first result summed over devices, its second).

    It is called with a `Split`, the device's `hidden_BLE` and `rows` (arrays [B, L]), and the head:
    gathered over `fsdp`, split over `tensor` where V divides. It returns a sum over the device's
    rows, or None, and an array [B, L, ...], the same for all along `tensor`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(Split(), hidden_BLE, kernel_EV, bias_V, rows)
    E, V = kernel_EV.shape
    vocab_axis = "tensor" if mesh.shape["tensor"] > 1 and V % mesh.shape["tensor"] == 0 else None
    fsdp_axis = "fsdp" if E % mesh.shape["fsdp"] == 0 else None
    split = Split(BATCH, vocab_axis)

    def device(hidden_BLE, kernel_EV, bias_V, rows):
        # These casts transpose to the sums over devices: one each, outside the walk over chunks;
        # and the gathering to a sum of which each device is sent its part.
        bias_V = _varying(bias_V, BATCH)
        kernel_EV = _varying(kernel_EV, tuple(axis for axis in BATCH if axis != fsdp_axis))
        if fsdp_axis and mesh.shape["fsdp"] > 1:
            kernel_EV = lax.all_gather(kernel_EV, "fsdp", axis=0, tiled=True)
        if vocab_axis:
            hidden_BLE = _varying(hidden_BLE, (vocab_axis,))
        total, nll_BL = function(split, hidden_BLE, kernel_EV, bias_V, rows)
        return lax.psum(total, BATCH), nll_BL

    specs = (act_BLD, P(fsdp_axis, vocab_axis), P(vocab_axis), tuple(act_BL for _ in rows))
    arguments = jax.tree.map(reshard, (hidden_BLE, kernel_EV, bias_V, rows), specs)
    return jax.shard_map(device, in_specs=specs, out_specs=(P(), act_BL))(*arguments)


def _flat(walk: Callable, settings: _Settings, split: Split, hidden_BLE, kernel_EV, bias_V, rows):
    """`walk` over the tokens of all rows, for `per_device`."""
    B, L, E = hidden_BLE.shape
    settings = settings._replace(**split._asdict())
    hidden_TE, rows_T = hidden_BLE.reshape(-1, E), [row.reshape(-1) for row in rows]
    total, nll_T = walk(settings, hidden_TE, kernel_EV, bias_V, *rows_T)
    return total, nll_T.reshape(B, L)


def _varying(tree, axes: tuple[str, ...]):
    """`tree`, the same on all devices along `axes`, typed as free to differ (inside shard_map)."""
    return jax.tree.map(lambda x: lax.pcast(x, axes, to="varying"), tree)


def _plain(settings: _Settings, hidden_TE, kernel_EV, bias_V, labels_T):
    return None, _nll(settings, hidden_TE, kernel_EV, bias_V, labels_T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(settings: _Settings, hidden_TE, kernel_EV, bias_V, labels_T):
    return _walk(settings, hidden_TE, kernel_EV, bias_V, labels_T)[0]


def _nll_forward(settings, *arguments):
    return _nll(settings, *arguments), arguments


def _nll_backward(settings, arguments, cotangent_T):
    _, _, gradients = _walk(settings, *arguments, weights_T=cotangent_T)
    return *gradients, None


_nll.defvjp(_nll_forward, _nll_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(settings: _Settings, hidden_TE, kernel_EV, bias_V, labels_T, weights_T):
    nll_T, cost_T, _ = _walk(settings, hidden_TE, kernel_EV, bias_V, labels_T)
    return jnp.sum(weights_T * cost_T), nll_T


def _weighted_forward(settings, *arguments):
    nll_T, cost_T, gradients = _walk(settings, *arguments)
    return (jnp.sum(arguments[-1] * cost_T), nll_T), (*gradients, cost_T)


def _weighted_backward(settings, residuals, cotangents):
    # The gradients in the residuals are those of the sum; nll_T is for reading only.
    *gradients, cost_T = ((cotangents[0] * x).astype(x.dtype) for x in residuals)
    return *gradients, None, cost_T


_weighted.defvjp(_weighted_forward, _weighted_backward)


def _walk(settings: _Settings, hidden_TE, kernel_EV, bias_V, labels_T, weights_T=None):
    """nll_T and cost_T, a chunk of real tokens at a time, and sum(weights * cost)'s gradients.

    The gradients: hidden in its own type, kernel and bias in float32; all of this device alone;
    () without weights.
    """
    T, E = hidden_TE.shape
    size = settings.chunk or -(-T // NUM_CHUNKS)
    num_chunks = -(-T // size)
    is_pad_T = labels_T == PAD_ID
    order_T = jnp.argsort(is_pad_T, stable=True)  # real tokens first
    order_XC = jnp.pad(order_T, (0, num_chunks * size - T)).reshape(num_chunks, size)
    num_real = T - jnp.sum(is_pad_T)
    num_live = -(-num_real // size)
    if settings.vocab_axis:  # chunks hold collectives, so all devices walk equally far
        num_live = lax.pmax(num_live, settings.batch_axes)
    kernel_EV = kernel_EV.astype(hidden_TE.dtype)

    def one_chunk(i, carry):
        rows_C = order_XC[i]
        is_real_C = i * size + jnp.arange(size) < num_real
        hidden_CE = hidden_TE[rows_C]
        *scores, slope_CV = _chunk(settings, hidden_CE, kernel_EV, bias_V, labels_T[rows_C])
        scores = [
            score_XC.at[i].set(jnp.where(is_real_C, score_C, 0))
            for score_XC, score_C in zip(carry[:2], scores, strict=True)
        ]
        if weights_T is None:
            return tuple(scores)
        hidden_XCE, d_kernel_EV, d_bias_V = carry[2:]
        slope_CV *= jnp.where(is_real_C, weights_T[rows_C], 0)[:, None]
        d_bias_V += slope_CV.sum(0)
        slope_CV = slope_CV.astype(hidden_TE.dtype)
        hidden_XCE = hidden_XCE.at[i].set(slope_CV @ kernel_EV.T)
        d_kernel_EV += _matmul(hidden_CE.T, slope_CV)
        return *scores, hidden_XCE, d_kernel_EV, d_bias_V

    carry = _varying((jnp.zeros(order_XC.shape),) * 2, settings.batch_axes)
    if weights_T is not None:
        zeros = (
            jnp.zeros((*order_XC.shape, E), hidden_TE.dtype),
            jnp.zeros(kernel_EV.shape),
            jnp.zeros(bias_V.shape),
        )
        carry += _varying(zeros, (*settings.batch_axes, *filter(None, [settings.vocab_axis])))
    nll_XC, cost_XC, *gradients = lax.fori_loop(0, num_live, one_chunk, carry)
    place_T = jnp.zeros_like(order_T).at[order_T].set(jnp.arange(T))  # undoes the sort
    nll_T, cost_T = nll_XC.reshape(-1)[place_T], cost_XC.reshape(-1)[place_T]
    if gradients:
        gradients[0] = gradients[0].reshape(-1, E)[place_T]
    return nll_T, cost_T, gradients


def _chunk(settings: _Settings, hidden_CE, kernel_EV, bias_V, labels_C):
    """nll_C, cost_C, and the derivative of the cost in the logits, slope_CV."""
    V = bias_V.shape[0]
    axis = settings.vocab_axis

    def over_vocab(x):
        return lax.psum(x, axis) if axis else x

    column_V = jnp.arange(V) + (V * lax.axis_index(axis) if axis else 0)
    is_real_V = column_V < settings.vocab_size
    is_label_CV = labels_C[:, None] == column_V[None, :]
    logits_CV = _matmul(hidden_CE, kernel_EV) + jnp.where(is_real_V, bias_V, -jnp.inf)[None, :]
    max_C = logits_CV.max(1)
    max_C = lax.pmax(max_C, axis) if axis else max_C
    exp_CV = jnp.exp(logits_CV - max_C[:, None])
    sum_C = over_vocab(exp_CV.sum(1))
    logsumexp_C = max_C + jnp.log(sum_C)
    slope_CV = exp_CV * (1 / sum_C)[:, None]
    if settings.z_loss:
        slope_CV *= 1 + 2 * settings.z_loss * logsumexp_C[:, None]
    label_logit_C = over_vocab(jnp.where(is_label_CV, logits_CV, 0).sum(1))
    if settings.label_smoothing:
        off = settings.label_smoothing / (settings.vocab_size - 1)
        on = 1 - settings.label_smoothing
        all_C = over_vocab(jnp.where(is_real_V[None, :], logits_CV, 0).sum(1))
        nll_C = logsumexp_C - (on - off) * label_logit_C - off * all_C
        slope_CV -= jnp.where(is_label_CV, on, jnp.where(is_real_V, off, 0)[None, :])
    else:
        nll_C = logsumexp_C - label_logit_C
        slope_CV -= is_label_CV
    return nll_C, nll_C + settings.z_loss * logsumexp_C**2, slope_CV


def _matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
