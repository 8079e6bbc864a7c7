"""Multi-head attention: of a sequence to itself, and of text to patches."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from capjax.dims import Array, Float
from capjax.mesh import kernel_DN3K, kernel_DNK, kernel_NKD
from capjax.models.fused_attention import choose, fused_attend
from capjax.models.layers import Projection
from capjax.models.parameters import Law, ones, parameter
from capjax.models.rotary import rotate

KernelInit = Callable[[int, int], Law]  # of the kernel's fan in and fan out
MASKED = float(jnp.finfo(jnp.float32).min)  # finite, so that differences of logits never give NaN


@jax.custom_vjp
def _softmax(logits_BNLS: Array, like: Array) -> Array:
    """Softmax over keys in float32, kept (also for the backward pass) in the type of `like`."""
    return jax.nn.softmax(logits_BNLS, -1).astype(like.dtype)


def _softmax_forward(logits_BNLS, like):
    weights_BNLS = _softmax(logits_BNLS, like)
    return weights_BNLS, weights_BNLS


def _softmax_backward(weights_BNLS, dweights_BNLS):
    weights_BNLS = weights_BNLS.astype(jnp.float32)
    product_BNLS = weights_BNLS * dweights_BNLS.astype(jnp.float32)
    return product_BNLS - weights_BNLS * jnp.sum(product_BNLS, -1, keepdims=True), None


_softmax.defvjp(_softmax_forward, _softmax_backward)


def causal_bias(num_queries: int, num_keys: int) -> Float[Array, "1 1 L S"]:
    """0 where key j is not after query i, `MASKED` elsewhere."""
    visible_LS = jnp.tril(jnp.ones((num_queries, num_keys), bool))
    return jnp.where(visible_LS, 0.0, MASKED)[None, None]


def attend(
    query_BLNK: Float[Array, "B L N K"],
    key_BSNK: Float[Array, "B S N K"],
    value_BSNK: Float[Array, "B S N K"],
    bias_B1LS: Float[Array, "#B 1 #L S"] | None = None,
    *,
    is_causal: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B L N K"]:
    """Softmax attention. `bias` is 0 where a key may be seen and `MASKED` where not.

    It is added rather than selected by, because an addition keeps nothing for the backward pass.

    Args:
      is_causal: position i sees the keys up to i, and of those what the bias lets it.
      implementation: "xla" is this form in plain JAX; "cudnn", "pallas" and "auto" are explained in
        `fused_attention`. `UserError` where it cannot run.
    """
    kernel = choose(implementation, query_BLNK, key_BSNK, has_bias=bias_B1LS is not None)
    if kernel != "xla":
        return fused_attend(
            query_BLNK,
            key_BSNK,
            value_BSNK,
            bias_B1LS,
            is_causal=is_causal,
            implementation=kernel,
        )
    if is_causal:
        causal_11LS = causal_bias(query_BLNK.shape[1], key_BSNK.shape[1])
        bias_B1LS = causal_11LS if bias_B1LS is None else jnp.minimum(bias_B1LS, causal_11LS)
    query_BLNK = query_BLNK * jnp.asarray(query_BLNK.shape[-1] ** -0.5, query_BLNK.dtype)
    logits_BNLS = jnp.einsum(
        "BLNK,BSNK->BNLS", query_BLNK, key_BSNK, preferred_element_type=jnp.float32
    )
    if bias_B1LS is not None:
        logits_BNLS += bias_B1LS
    weights_BNLS = _softmax(logits_BNLS, value_BSNK)
    return jnp.einsum("BNLS,BSNK->BLNK", weights_BNLS, value_BSNK)


def project_heads(
    width: int, num_heads: int, num: int, head_width: int, init: KernelInit, *, use_bias: bool
) -> Projection:
    """`num` projections onto heads side by side (D, N, num, K): one matmul instead of `num`."""
    law = init(width, num_heads * head_width)
    shape = (num_heads, num, head_width)
    return Projection((width,), shape, kernel_DN3K, law, use_bias=use_bias)


def merge_heads(
    num_heads: int, head_width: int, width: int, init: KernelInit, *, use_bias: bool
) -> Projection:
    """The output projection of an attention; its sum over heads crosses the tensor axis."""
    law = init(num_heads * head_width, width)
    return Projection((num_heads, head_width), (width,), kernel_NKD, law, use_bias=use_bias)


def split_heads(x_BLN3K: Array) -> list[Array]:
    """What `project_heads` put side by side, each (B, L, N, K)."""
    # `split`, because its gradient is one concatenation where a slice's is a sum of padded arrays.
    parts = lax.split(x_BLN3K, (1,) * x_BLN3K.shape[3], axis=3)
    return [jnp.squeeze(part, 3) for part in parts]


class HeadNorm(nnx.Module):
    """LayerNorm without bias over the width of each head, for queries and keys (QK-norm).

    It bounds the attention logits, whose growth makes large models diverge (Dehghani et al. 2023,
    ViT-22B); in the form of Flax's `MultiHeadDotProductAttention(normalize_qk=True)`.
    """

    def __init__(self, head_width: int, eps: float):
        self.scale = parameter(ones, (head_width,))
        self.eps = eps

    def __call__(self, x_BLNK: Float[Array, "B L N K"]) -> Float[Array, "B L N K"]:
        return _normalize_heads(x_BLNK, self.scale[...], self.eps)


@functools.partial(jax.checkpoint, static_argnums=2)  # keeps the input alone, in its own type
def _normalize_heads(x_BLNK: Array, scale_K: Array, eps: float) -> Array:
    x32_BLNK = x_BLNK.astype(jnp.float32)
    x32_BLNK -= jnp.mean(x32_BLNK, -1, keepdims=True)
    variance_BLN1 = jnp.mean(jnp.square(x32_BLNK), -1, keepdims=True)
    y_BLNK = x32_BLNK * lax.rsqrt(variance_BLN1 + eps) * scale_K[None, None, None, :]
    return y_BLNK.astype(x_BLNK.dtype)


class SelfAttention(nnx.Module):
    """Multi-head self-attention.

    With `qk_norm` queries and keys go through a `HeadNorm` each, with `rotary` they are turned by
    their positions (see `rotary`). `implementation`: see `attend`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        init: KernelInit,
        *,
        use_bias: bool,
        qk_norm: bool = False,
        rotary: bool = False,
        implementation: str = "auto",
        norm_eps: float = 1e-6,
    ):
        head_width = width // num_heads
        self.qkv = project_heads(width, num_heads, 3, head_width, init, use_bias=use_bias)
        self.out = merge_heads(num_heads, head_width, width, init, use_bias=use_bias)
        self.query_norm = HeadNorm(head_width, norm_eps) if qk_norm else None
        self.key_norm = HeadNorm(head_width, norm_eps) if qk_norm else None
        self.rotary = rotary
        self.implementation = implementation

    def project(self, x_BLD: Float[Array, "B L D"], position: Array | None = None) -> list[Array]:
        """Query, key and value, each (B, L, N, K); for the positions see `rotate`."""
        query, key, value = split_heads(self.qkv(x_BLD))
        query, key = _apply(self.query_norm, query), _apply(self.key_norm, key)
        if self.rotary:
            query, key = rotate(query, position), rotate(key, position)
        return [query, key, value]

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        bias_B1LS: Array | None = None,
        *,
        is_causal: bool = False,
    ) -> Float[Array, "B L D"]:
        query, key, value = self.project(x_BLD)
        attended = attend(
            query,
            key,
            value,
            bias_B1LS,
            is_causal=is_causal,
            implementation=self.implementation,
        )
        return self.out(attended)


class CrossAttention(nnx.Module):
    """Multi-head attention of a sequence (width E) to a memory (width D); options as in self-."""

    def __init__(
        self,
        width: int,
        memory_width: int,
        num_heads: int,
        init: KernelInit,
        *,
        use_bias: bool = False,
        qk_norm: bool = False,
        implementation: str = "auto",
        norm_eps: float = 1e-6,
    ):
        head_width = width // num_heads
        shape = (num_heads, head_width)
        self.query = Projection((width,), shape, kernel_DNK, init(width, width), use_bias=use_bias)
        self.key_value = project_heads(
            memory_width, num_heads, 2, head_width, init, use_bias=use_bias
        )
        self.out = merge_heads(num_heads, head_width, width, init, use_bias=use_bias)
        self.query_norm = HeadNorm(head_width, norm_eps) if qk_norm else None
        self.key_norm = HeadNorm(head_width, norm_eps) if qk_norm else None
        self.implementation = implementation

    def project_query(self, x_BLE: Float[Array, "B L E"]) -> Float[Array, "B L N K"]:
        """The queries."""
        return _apply(self.query_norm, self.query(x_BLE))

    def project_memory(self, memory_BPD: Float[Array, "B P D"]) -> list[Array]:
        """Key and value of the memory, each (B, P, N, K)."""
        key, value = split_heads(self.key_value(memory_BPD))
        return [_apply(self.key_norm, key), value]

    def attend(
        self, query_BLNK: Float[Array, "B L N K"], memory: Sequence[Array]
    ) -> Float[Array, "B L E"]:
        """What queries find in a projected memory."""
        key, value = memory
        return self.out(attend(query_BLNK, key, value, implementation=self.implementation))

    def __call__(
        self, x_BLE: Float[Array, "B L E"], memory: Sequence[Array]
    ) -> Float[Array, "B L E"]:
        return self.attend(self.project_query(x_BLE), memory)


def _apply(norm: HeadNorm | None, x_BLNK: Array) -> Array:
    return x_BLNK if norm is None else norm(x_BLNK)
