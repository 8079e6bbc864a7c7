"""Attention in one kernel, which never writes the weights to memory, where a backend has one.

    cudnn   NVIDIA's, through `jax.nn.dot_product_attention`
    pallas  the flash attention that JAX ships for TPUs

What "auto" takes, and why it takes the plain form ("xla") elsewhere:

    CUDA    cudnn for half-precision heads of a width that it takes, without a mask or causal. Other
            masks are matrices that either form has to read, and in JAX a matrix goes into cuDNN as
            a bias with a gradient.
    TPU     pallas from `PALLAS_LENGTH` keys on, in whole blocks. Compiled for v5e, forward and
            backward, it moves 0.3 of the plain form's bytes at 1024 keys, 0.6 at 512, 0.9 at 256,
            and 1.5 times as many at 196, padded to 256.
    other   nothing: no kernel.

One query, as in decoding, has nothing to fuse: there every choice means the plain form.
"""

import jax
import jax.numpy as jnp

from capjax.dims import Array
from capjax.errors import UserError
from capjax.mesh import platform

PALLAS_LENGTH = 512
PALLAS_BLOCK = 128  # the least block of queries and of keys


def choose(implementation: str, query_BLNK: Array, key_BSNK: Array, *, has_bias: bool) -> str:
    """ "xla", "cudnn" or "pallas", from what is asked for, the default backend, and the shapes.

    Raises `UserError` where what is asked for cannot run.
    """
    if implementation == "xla" or query_BLNK.shape[1] == 1:
        return "xla"
    if implementation != "auto":
        if problem := _problem(implementation, query_BLNK):
            raise UserError(f"attention={implementation!r} {problem}; set it to 'auto' or 'xla'")
        return implementation
    backend = _backend()
    if backend == "cuda" and not has_bias:
        return "xla" if _problem("cudnn", query_BLNK) else "cudnn"
    if backend == "tpu" and not has_bias and key_BSNK.shape[1] >= PALLAS_LENGTH:
        lengths = query_BLNK.shape[1], key_BSNK.shape[1]
        return "xla" if any(length % PALLAS_BLOCK for length in lengths) else "pallas"
    return "xla"


def _problem(implementation: str, query_BLNK: Array) -> str:
    """Why a kernel cannot run here, or nothing. The rules for cuDNN are those that JAX checks."""
    backend, width = _backend(), query_BLNK.shape[-1]
    needs = {"cudnn": "cuda", "pallas": "tpu"}[implementation]
    if backend != needs:
        return f"needs the backend {needs!r}, but this one is {backend!r}"
    if implementation == "pallas":
        return ""
    if query_BLNK.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, but dtype={query_BLNK.dtype.name!r}"
    if width % 8 or width > 128:
        return f"takes heads of a width that is a multiple of 8 up to 128, but it is {width}"
    return ""


def _backend() -> str:
    """Of the mesh, or without one the default: "cuda" where cuDNN's flash attention runs."""
    name = platform()
    if name != "gpu" or name != jax.default_backend():
        return name
    device = jax.local_devices()[0]
    is_cuda = "cuda" in device.client.platform_version
    return "cuda" if is_cuda and float(device.compute_capability) >= 8.0 else "gpu"


def fused_attend(
    query_BLNK: Array,
    key_BSNK: Array,
    value_BSNK: Array,
    bias_B1LS: Array | None,
    *,
    is_causal: bool,
    implementation: str,
) -> Array:
    """`attention.attend` by one kernel; on a mesh each device runs it on its rows and heads."""
    kernel = {"cudnn": _cudnn, "pallas": _pallas}[implementation]
    arrays = (query_BLNK, key_BSNK, value_BSNK) + (() if bias_B1LS is None else (bias_B1LS,))

    def attend(query_BLNK, key_BSNK, value_BSNK, bias_B1LS=None):
        return kernel(query_BLNK, key_BSNK, value_BSNK, bias_B1LS, is_causal)

    if jax.sharding.get_abstract_mesh().empty:
        return attend(*arrays)
    specs = tuple(jax.typeof(x).sharding.spec for x in arrays)
    # Kernels do not say over which axes their results vary, so that cannot be checked.
    local = jax.shard_map(attend, in_specs=specs, out_specs=specs[0], check_vma=False)
    return local(*arrays)


def _cudnn(query_BLNK, key_BSNK, value_BSNK, bias_B1LS, is_causal: bool) -> Array:
    """Odd lengths are padded by one, since JAX refuses them in training; so is ViT-L/14's 257."""
    batch, num_queries = query_BLNK.shape[:2]
    lengths = num_queries, key_BSNK.shape[1]
    pads = tuple(length % 2 for length in lengths)
    query_BLNK, key_BSNK, value_BSNK = (
        jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
        for x, pad in ((query_BLNK, pads[0]), (key_BSNK, pads[1]), (value_BSNK, pads[1]))
    )
    if bias_B1LS is not None:
        bias_B1LS = jnp.pad(bias_B1LS, ((0, 0), (0, 0), (0, pads[0]), (0, pads[1])))
    used = [jnp.full(batch, length, jnp.int32) if any(pads) else None for length in lengths]
    attended_BLNK = jax.nn.dot_product_attention(
        query_BLNK,
        key_BSNK,
        value_BSNK,
        mask=None if bias_B1LS is None else bias_B1LS == 0,
        is_causal=is_causal,
        query_seq_lengths=used[0],
        key_value_seq_lengths=used[1],
        implementation="cudnn",
    )
    return attended_BLNK[:, :num_queries]


def _pallas(query_BLNK, key_BSNK, value_BSNK, bias_B1LS, is_causal: bool) -> Array:
    """Lengths are padded to whole blocks; the padding is a segment apart, which nothing sees."""
    # Here, because the import takes a fraction of a second that only TPUs need to pay.
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas_tpu

    batch, num_queries, num_heads, width = query_BLNK.shape
    lengths = num_queries, key_BSNK.shape[1]
    pads = tuple(-length % PALLAS_BLOCK for length in lengths)
    query_BNLK, key_BNSK, value_BNSK = (
        jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, pad), (0, 0)))
        for x, pad in ((query_BLNK, pads[0]), (key_BSNK, pads[1]), (value_BSNK, pads[1]))
    )
    segments = None
    if any(pads):
        segments = pallas_tpu.SegmentIds(
            *(
                jnp.broadcast_to(jnp.arange(length + pad) < length, (batch, length + pad)).astype(
                    jnp.int32
                )
                for length, pad in zip(lengths, pads, strict=True)
            )
        )
    if bias_B1LS is not None:
        bias_B1LS = jnp.pad(bias_B1LS, ((0, 0), (0, 0), (0, pads[0]), (0, pads[1])))
        shape = (batch, num_heads, *bias_B1LS.shape[2:])
        bias_B1LS = jax.lax.stop_gradient(jnp.broadcast_to(bias_B1LS, shape))
    query_block, key_block = (
        max(block for block in (512, 256, 128) if (length + pad) % block == 0)
        for length, pad in zip(lengths, pads, strict=True)
    )
    attended_BNLK = pallas_tpu.flash_attention(
        query_BNLK,
        key_BNSK,
        value_BNSK,
        ab=bias_B1LS,
        segment_ids=segments,
        causal=is_causal,
        sm_scale=width**-0.5,
        block_sizes=pallas_tpu.BlockSizes(
            block_b=1,
            block_q=query_block,
            block_k_major=key_block,
            block_k=key_block,
            block_q_major_dkv=query_block,
            block_k_major_dkv=key_block,
            block_k_dkv=key_block,
            block_q_dkv=query_block,
            block_k_major_dq=key_block,
            block_k_dq=key_block,
            block_q_dq=query_block,
        ),
    )
    return attended_BNLK[:, :, :num_queries].transpose(0, 2, 1, 3)
