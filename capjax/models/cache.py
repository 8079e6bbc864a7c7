"""The key/value cache of decoding, where an image has several rows of text side by side.

Rows of one image read its memory together, once. They come in groups of S: with guidance a second
group holds the same texts, which see another memory or none. Within a group a row's past may lie in
other rows (of which beams descend): `ancestors_BSL` says in which, so that no cache is ever moved.
Letters beyond `capjax.dims`: R all rows of an image, S those of a group, Q what attends together.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from capjax.dims import Array, Float, Int
from capjax.mesh import BATCH, act_BNRLK, gathered, out_sharding, reshard
from capjax.models.attention import MASKED, SelfAttention

Module = TypeVar("Module", bound=nnx.Module)


class LayerCache(NamedTuple):
    """Keys and values of the texts so far in one layer; heads stand before what is summed over."""

    key_BNRLK: Float[Array, "B N R L K"]
    value_BNRLK: Float[Array, "B N R L K"]


class ProjectedMemory(NamedTuple):
    """Keys and values of an image's memory in one layer."""

    key_BNPK: Float[Array, "B N P K"]
    value_BNPK: Float[Array, "B N P K"]


def empty_cache(
    batch: int, num_heads: int, num_rows: int, length: int, head_width: int, dtype: DTypeLike
) -> LayerCache:
    """Room for `length` tokens of `num_rows` texts an image."""
    shape = (batch, num_heads, num_rows, length, head_width)
    zeros_BNRLK = jnp.zeros(shape, dtype, out_sharding=out_sharding(act_BNRLK))
    return LayerCache(zeros_BNRLK, zeros_BNRLK)


def attend_to_cache(
    attention: SelfAttention,
    x_BRE: Float[Array, "B R E"],
    index: Int[Array, ""],
    cache: LayerCache,
    num_groups: int,
    ancestors_BSL: Int[Array, "B S L"] | None,
) -> tuple[Float[Array, "B R E"], LayerCache]:
    """`attention` of position `index` of each row to its past, and the cache with it written in."""
    num_rows, length = x_BRE.shape[1], cache.key_BNRLK.shape[3]
    query_BRNK, key_BRNK, value_BRNK = attention.project(x_BRE, jnp.full(num_rows, index))

    def write(old_BNRLK, new_BRNK):
        new_BNR1K = new_BRNK.transpose(0, 2, 1, 3)[:, :, :, None]
        return lax.dynamic_update_slice(old_BNRLK, new_BNR1K, (0, 0, 0, index, 0))

    cache = LayerCache(*map(write, cache, (key_BRNK, value_BRNK)))
    is_past_L = jnp.arange(length) <= index
    if ancestors_BSL is None:
        bias = jnp.where(is_past_L, 0.0, MASKED)[None, None, None, None, :]
        return attention.out(_attend(query_BRNK, cache, num_rows, bias)), cache
    rows_S = jnp.arange(num_rows // num_groups)
    is_ancestor_BSSL = ancestors_BSL[:, :, None, :] == rows_S[None, None, :, None]
    is_seen_BSSL = is_ancestor_BSSL & is_past_L[None, None, None, :]
    bias_B11ST = jnp.where(is_seen_BSSL, 0.0, MASKED).reshape(
        *(len(x_BRE), 1, 1, len(rows_S), len(rows_S) * length),
        out_sharding=out_sharding(P(BATCH, None, None, None, None)),
    )
    return attention.out(_attend(query_BRNK, cache, num_groups, bias_B11ST)), cache


def attend_to_memory(
    query_BSNK: Float[Array, "B S N K"], memory: ProjectedMemory
) -> Float[Array, "B S N K"]:
    """Softmax attention of an image's rows to its memory, which is read once for all of them."""
    return _attend(query_BSNK, LayerCache(*(x[:, :, None] for x in memory)), 1, None)


def _attend(
    query_BRNK: Array, cache: LayerCache, num_sets: int, bias: Float[Array, "#B 1 1 #S T"] | None
) -> Float[Array, "B R N K"]:
    """Softmax attention in sets of rows: each row sees the keys of its own set of rows."""
    batch, _, num_heads, head_width = query_BRNK.shape
    spec_QSNK = P(BATCH, None, None, "tensor", None)
    query_BQSNK = query_BRNK.reshape(
        batch, num_sets, -1, num_heads, head_width, out_sharding=out_sharding(spec_QSNK)
    )
    query_BQSNK *= jnp.asarray(head_width**-0.5, query_BRNK.dtype)
    key_BNQTK, value_BNQTK = (
        x.reshape(batch, num_heads, num_sets, -1, head_width, out_sharding=out_sharding(act_BNRLK))
        for x in cache
    )
    logits_BNQST = jnp.einsum(
        "BQSNK,BNQTK->BNQST", query_BQSNK, key_BNQTK, preferred_element_type=jnp.float32
    )
    if bias is not None:
        logits_BNQST += bias
    weights_BNQST = jax.nn.softmax(logits_BNQST, -1).astype(value_BNQTK.dtype)
    found_BQSNK = jnp.einsum("BNQST,BNQTK->BQSNK", weights_BNQST, value_BNQTK)
    return found_BQSNK.reshape(
        query_BRNK.shape, out_sharding=out_sharding(P(BATCH, None, "tensor", None))
    )


def ready(module: Module, dtype: DTypeLike) -> Module:
    """The module with its matrices in the compute type and gathered, once for all positions.

    Vectors keep their type: layers compute with those of their norms in float32.
    """

    def prepare(param: nnx.Param) -> nnx.Variable:
        value, spec = param[...], param.get_metadata("spec")
        if value.ndim < 2:
            return param
        return param.replace(reshard(value.astype(dtype), gathered(spec)))

    return jax.tree.map(prepare, module, is_leaf=lambda x: isinstance(x, nnx.Param))
