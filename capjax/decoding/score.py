"""How probable a model finds given captions of given images."""

import functools

import jax
import jax.numpy as jnp

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Float, Int, Params
from capjax.mesh import act_BL, reshard
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa
from capjax.objectives.captioning import decoder_inputs, token_nll


@functools.partial(jax.jit, static_argnames="model")
def score(
    model: Captioner | CoCa, params: Params, inputs: Array, labels_BL: Int[Array, "B L"]
) -> Float[Array, "B"]:
    """log p(caption | image) of each row, in float32: the sum over its tokens and its EOS.

    `inputs` are images [B, H, W, C] or encoded patches [B, P, D]; `labels_BL` are ids as the
    tokenizer's `encode` gives them. Minus the training loss, times the number of tokens. A greedy
    caption scores the sum of the log-probabilities it was generated with.
    """
    patches_BPD = model.encode(params, inputs) if inputs.ndim == 4 else inputs
    labels_BL = reshard(labels_BL, act_BL)
    tokens_BL = decoder_inputs(labels_BL, None, model.mask_id)
    hidden_BLE = model.hidden(params, tokens_BL, patches_BPD, None)
    nll_BL = token_nll(
        hidden_BLE, *model.output_head(params), labels_BL, vocab_size=model.config.vocab_size
    )
    return -jnp.sum(jnp.where(labels_BL == PAD_ID, 0.0, nll_BL), axis=1)
