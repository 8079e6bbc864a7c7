"""Where a captioner looks as it writes: the weights of its attention to the image."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Float, Int, Params, UInt8
from capjax.mesh import act_BLNK
from capjax.models.attentional_pooler import AttentionalPooler
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa
from capjax.models.image_encoder import normalize
from capjax.models.parameters import broadcast, use


@functools.partial(jax.jit, static_argnums=0)
def attention_maps(
    model: Captioner | CoCa,
    params: Params,
    images_BHWC: UInt8[Array, "B H W C"],
    labels_BL: Int[Array, "B L"],
) -> Float[Array, "B X N L P"]:
    """The weights, in float32, of every head in every layer that reads the image; they sum to 1.

    [b, x, n, l] is what head n of layer x finds where label l is predicted, the labels before it
    given; `labels_BL` are ids as the tokenizer's `encode` gives them. The last axis is the image
    encoder's sequence, of which the first `num_patches` are the patches, row by row.

    A CoCa's layers look at pooled tokens: their weights are carried on to the encoder's sequence by
    those of the pooler, averaged over its heads. That is no longer exact, since a head of the
    decoder reads all heads of the pooler mixed.
    """
    module = model.module(params)
    decoder = module.decoder
    memory_BPD = encoded_BPD = module.encoder(normalize(images_BHWC, model.config))
    inputs_BL = jnp.pad(labels_BL[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID)
    if isinstance(model, CoCa):
        memory_BPD = module.caption_pooler(encoded_BPD)
        x_BLE, blocks = decoder.text(inputs_BL), decoder.multimodal_blocks
    else:
        x_BLE, blocks = decoder.embed(inputs_BL, memory_BPD.dtype), decoder.blocks

    def read(x_BLE, block):
        x_BLE, query_BLNK = block.before_memory(x_BLE, is_causal=True)
        memory = block.cross_attention.project_memory(memory_BPD)
        return block.from_memory(x_BLE, query_BLNK, memory), _weights(query_BLNK, memory[0])

    _, weights_XBNLP = lax.scan(read, x_BLE, blocks)
    weights_BXNLP = weights_XBNLP.swapaxes(0, 1)
    if isinstance(model, CoCa):
        pooled_BQP = _pooler_weights(module.caption_pooler, encoded_BPD).mean(1)
        return jnp.einsum("BXNLQ,BQP->BXNLP", weights_BXNLP, pooled_BQP)
    return weights_BXNLP


def _weights(
    query_BLNK: Float[Array, "B L N K"], key_BPNK: Float[Array, "B P N K"]
) -> Float[Array, "B N L P"]:
    """The softmax inside `attention.attend`."""
    query_BLNK = query_BLNK * jnp.asarray(query_BLNK.shape[-1] ** -0.5, query_BLNK.dtype)
    logits_BNLP = jnp.einsum(
        "BLNK,BPNK->BNLP", query_BLNK, key_BPNK, preferred_element_type=jnp.float32
    )
    return jax.nn.softmax(logits_BNLP, axis=-1)


def _pooler_weights(
    pooler: AttentionalPooler, x_BPD: Float[Array, "B P D"]
) -> Float[Array, "B N Q P"]:
    query_1QNK = pooler.attention.project_query(use(pooler.queries, x_BPD.dtype)[None])
    query_BQNK = broadcast(query_1QNK, (len(x_BPD), *query_1QNK.shape[1:]), act_BLNK)
    return _weights(query_BQNK, pooler.attention.project_memory(x_BPD)[0])
