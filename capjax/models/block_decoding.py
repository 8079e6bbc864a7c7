"""Several positions of each text in one causal pass, each text at its own place: for drafts.

Beside `cache`, whose rows all write the same position. Letters beyond `capjax.dims`: W the width of
the window, T the length of the cache.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from capjax.dims import Array, Float, Int, Params
from capjax.mesh import act_BLD, act_BLNK, out_sharding
from capjax.models.attention import MASKED, attend
from capjax.models.cache import ProjectedMemory, attend_to_memory, ready
from capjax.models.captioner import Captioner
from capjax.models.stack import unstack


class BlockCache(NamedTuple):
    """Keys and values of the texts so far in one layer."""

    key_BTNK: Float[Array, "B T N K"]
    value_BTNK: Float[Array, "B T N K"]


Seen = tuple[ProjectedMemory, ...]  # of each layer
Caches = tuple[BlockCache, ...]
# (tokens_BW, start_B, seen, caches) -> (logits_BWV, caches)
ReadBlock = Callable[[Array, Array, Seen, Caches], tuple[Array, Caches]]


def start_block_decoding(
    model: Captioner,
    params: Params,
    memory_BPD: Float[Array, "B P D"],
    *,
    batch: int,
    length: int,
    width: int,
) -> tuple[ReadBlock, Seen, Caches]:
    """(read, seen, caches) to read texts of up to `length` tokens in windows of `width`.

    `read(tokens_BW, start_B, seen, caches)` takes the decoder inputs of positions start[b] ..
    start[b] + W - 1 and gives the float32 logits of what follows each, and the caches with the
    window written in. What lies in the cache from start[b] on is written over, so a window may be
    read again from where its inputs turned out to be wrong. `seen` is the projected memory of
    each row: of all rows of `memory_BPD`, of which a caller may put `batch` at a time.
    """
    decoder, dtype = model.module(params).decoder, model.config.dtype
    layers = [ready(block, dtype) for block in unstack(decoder.blocks)]
    embedding = ready(decoder.token_embedding, jnp.float32)
    norm, head = decoder.norm, ready(decoder.head, dtype)
    positions_LE = None if decoder.posemb == "rotary" else decoder.positions(dtype)

    def read(tokens_BW, start_B, seen, caches):
        position_BW = start_B[:, None] + jnp.arange(tokens_BW.shape[1])[None]
        x_BWE = embedding(tokens_BW, dtype)
        if positions_LE is not None:
            place_BW = jnp.minimum(position_BW, len(positions_LE) - 1)  # beyond: never used
            x_BWE += positions_LE.at[place_BW].get(out_sharding=out_sharding(act_BLD))
        after = []
        for layer, memory, cache in zip(layers, seen, caches, strict=True):
            heads = layer.self_attention.project(layer.self_norm(x_BWE), position_BW)
            found_BWNK, cache = _look_back(heads, start_B, position_BW, cache)
            x_BWE = x_BWE + layer.self_attention.out(found_BWNK)
            query_BWNK = layer.cross_attention.project_query(layer.cross_norm(x_BWE))
            x_BWE = x_BWE + layer.cross_attention.out(attend_to_memory(query_BWNK, memory))
            x_BWE = x_BWE + layer.mlp(layer.mlp_norm(x_BWE))
            after.append(cache)
        return head(norm(x_BWE)), tuple(after)

    seen = tuple(layer.project_memory(memory_BPD) for layer in layers)
    num_heads, head_width = layers[0].self_attention.out.in_shape
    zeros_BTNK = jnp.zeros(
        (batch, length + width - 1, num_heads, head_width),
        dtype,
        out_sharding=out_sharding(act_BLNK),
    )
    return read, seen, (BlockCache(zeros_BTNK, zeros_BTNK),) * len(layers)


def place_window(
    whole_BT: Array, window_BW: Array, start_B: Int[Array, "B"], num_new_B: Int[Array, "B"]
) -> Array:
    """`whole` [B, T, ...], the first num_new[b] of `window` [B, W, ...] put in at start[b]."""
    offset_BT = jnp.arange(whole_BT.shape[1])[None] - start_B[:, None]
    offset_BT = jnp.where(offset_BT < num_new_B[:, None], offset_BT, -1)
    offset_BT = offset_BT.reshape(*offset_BT.shape, *(1,) * (whole_BT.ndim - 2))
    for place in range(window_BW.shape[1]):  # one fused pass; a gather would go number by number
        new_B1 = window_BW[:, place : place + 1]
        whole_BT = jnp.where(offset_BT == place, new_B1, whole_BT)
    return whole_BT


def _look_back(
    heads: list[Array], start_B: Array, position_BW: Array, cache: BlockCache
) -> tuple[Float[Array, "B W N K"], BlockCache]:
    """Self-attention of a window to all positions up to each of its own."""
    query_BWNK, *new = heads
    num_new_B = jnp.full_like(start_B, query_BWNK.shape[1])
    cache = BlockCache(
        *(place_window(old, x, start_B, num_new_B) for old, x in zip(cache, new, strict=True))
    )
    is_past_BWT = jnp.arange(cache.key_BTNK.shape[1])[None, None] <= position_BW[:, :, None]
    bias_B1WT = jnp.where(is_past_BWT, 0.0, MASKED)[:, None]
    return attend(query_BWNK, *cache, bias_B1WT, implementation="xla"), cache
