"""Many texts of one image in one causal pass, for scoring: the memory is projected once for all.

The texts of an image lie in one sequence of M positions; which of them see which is a `LookBack`:
in rows of equal length (`rows`), or in a tree in which a prefix stands once (`tree`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from capjax.dims import Array, Bool, Float, Int, Params
from capjax.mesh import act_B, act_BLD, act_BLNK, out_sharding, replicated, reshard
from capjax.models.attention import MASKED, attend
from capjax.models.cache import ready
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa
from capjax.models.decoder_block import DecoderBlock
from capjax.models.parameters import broadcast
from capjax.models.stack import unstack

LookBack = Callable[[Array, Array, Array], Array]  # query, key, value [B, M, N, K] -> [B, M, N, K]
Read = Callable[[Array, Array, LookBack], Array]


def rows(num_rows: int, implementation: str) -> LookBack:
    """`num_rows` texts of equal length one after the other, each by itself."""

    def look_back(query_BMNK, key_BMNK, value_BMNK):
        shape = query_BMNK.shape
        split = (shape[0] * num_rows, shape[1] // num_rows, *shape[2:])
        parts = [_reshape(x, split) for x in (query_BMNK, key_BMNK, value_BMNK)]
        return _reshape(attend(*parts, is_causal=True, implementation=implementation), shape)

    return look_back


def tree(is_seen_MM: Bool[Array, "M M"], implementation: str) -> LookBack:
    """Position i sees the positions j of `is_seen[i, j]`: its ancestors and itself."""
    bias_11MM = jnp.where(is_seen_MM, 0.0, MASKED)[None, None]

    def look_back(query_BMNK, key_BMNK, value_BMNK):
        return attend(query_BMNK, key_BMNK, value_BMNK, bias_11MM, implementation=implementation)

    return look_back


def null_memory(model: Captioner | CoCa, params: Params, batch: int) -> Float[Array, "B 1 D"]:
    """What stands for no image, once: attention finds in many of it what it finds in one."""
    shape = (batch, 1, model.config.width)
    zeros_B1D = jnp.zeros(shape, model.config.dtype, out_sharding=out_sharding(act_BLD))
    is_dropped_B = jnp.ones(batch, bool, out_sharding=out_sharding(act_B))
    return model.drop_memory(params, zeros_B1D, is_dropped_B)


def start_reading(model: Captioner | CoCa, params: Params, memory_BPD: Array) -> Read:
    """`read(tokens, position_M, look_back)` -> states [B, M, E] after the final LayerNorm.

    `tokens` are decoder inputs [B, M], or [1, M] where all images have the same: what comes before
    the first sight of an image is then computed once. Position m stands at place `position_M[m]` of
    its text. Parameters are cast, and the memory projected, here, once.
    """
    decoder, dtype = model.module(params).decoder, memory_BPD.dtype
    if isinstance(model, CoCa):
        stacks, positions_LE = (
            [decoder.unimodal_blocks, decoder.multimodal_blocks],
            (decoder.positions()),
        )
    else:
        stacks, positions_LE = [decoder.blocks], decoder.positions(dtype)
        if decoder.posemb == "rotary":
            positions_LE = None
    layers = [ready(block, dtype) for blocks in stacks for block in unstack(blocks)]
    seen = [
        layer.cross_attention.project_memory(memory_BPD)
        if isinstance(layer, DecoderBlock)
        else None
        for layer in layers
    ]
    table_VE = reshard(decoder.token_embedding.embedding[...], replicated)

    def read(tokens: Int[Array, "#B M"], position_M: Int[Array, "M"], look_back: LookBack) -> Array:
        spec = P(jax.typeof(tokens).sharding.spec[0], None, None)
        x = table_VE.at[tokens].get(out_sharding=out_sharding(spec)).astype(dtype)
        if positions_LE is not None:
            x += broadcast(positions_LE[position_M][None], x.shape, spec)
        for layer, memory in zip(layers, seen, strict=True):
            heads = layer.self_attention.project(layer.self_norm(x), position_M)
            x += layer.self_attention.out(look_back(*heads))
            if memory is None:
                x += layer.mlp(layer.mlp_norm(x))
                continue
            query = layer.cross_attention.project_query(layer.cross_norm(x))
            x, query = _of_each_image(len(memory_BPD), x, query)
            x = layer.from_memory(x, query, memory)
        return decoder.norm(x)

    return read


def _of_each_image(batch: int, x: Array, query: Array) -> tuple[Array, Array]:
    if len(x) == batch:
        return x, query
    return (
        broadcast(x, (batch, *x.shape[1:]), act_BLD),
        broadcast(query, (batch, *query.shape[1:]), act_BLNK),
    )


def _reshape(x: Array, shape: tuple[int, ...]) -> Array:
    return x.reshape(shape, out_sharding=out_sharding(act_BLNK))
