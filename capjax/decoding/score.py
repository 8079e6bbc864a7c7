"""How probable a model finds given captions of given images, token by token.

A caption's score is its log-likelihood, summed or by the token, minus alpha times its prior: what
the model gives it without an image (Lin et al. 2023, "VisualGPTScore"; the prior needs a model
trained with `image_dropout`). Letters beyond `capjax.dims`: S captions of an image.
"""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from capjax.data.tokenizer import PAD_ID
from capjax.decoding.inputs import compiled_size, pad_rows
from capjax.dims import Array, Float, Int, Params
from capjax.errors import UserError
from capjax.mesh import act_BL, act_BLD, out_sharding, reshard
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa
from capjax.models.many_texts import null_memory, rows, start_reading
from capjax.objectives.captioning import decoder_inputs, token_nll

Values = TypeVar("Values", Array, np.ndarray)
_PRIORS_AT_ONCE = 64


def score(
    model: Captioner | CoCa, params: Params, inputs: Array, labels_BL: Int[Array, "B L"]
) -> Float[Array, "B"]:
    """log p(caption | image) of each row, in float32: the sum over its tokens and its EOS.

    `inputs` and `labels_BL` are those of `score_tokens`, with one caption an image. Minus the
    training loss, times the number of tokens.
    """
    return jnp.sum(score_tokens(model, params, inputs, labels_BL[:, None])[:, 0], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def score_tokens(
    model: Captioner | CoCa,
    params: Params,
    inputs: Array | None,
    labels_BSL: Int[Array, "B S L"],
) -> Float[Array, "B S L"]:
    """log p(token | tokens before it, image) of S captions an image, in float32; 0 at padding.

    `inputs` are images [B, H, W, C], what `encode` made of them [B, P, D], or None for no image:
    the prior. `labels_BSL` are ids as the tokenizer's `encode` gives them. Each image is encoded,
    and projected in every layer, once. A greedy caption has the log-probabilities it was generated
    with. Raises `UserError` for captions beyond the model's text length.
    """
    batch, num_captions, length = labels_BSL.shape
    memory_BPD = encoded(model, params, inputs, batch, length)
    labels_BSL = reshard(labels_BSL, act_BLD)
    inputs_BSL = jax.vmap(lambda x: decoder_inputs(x, None, model.mask_id), 1, 1)(labels_BSL)
    shape = (batch, num_captions * length)
    tokens_BM, labels_BM = (
        x.reshape(shape, out_sharding=out_sharding(act_BL)) for x in (inputs_BSL, labels_BSL)
    )
    hidden_BME = start_reading(model, params, memory_BPD)(
        tokens_BM,
        jnp.tile(jnp.arange(length), num_captions),
        rows(num_captions, model.config.attention),
    )
    nll_BM = token_nll(
        hidden_BME, *model.output_head(params), labels_BM, vocab_size=model.config.vocab_size
    )
    logprobs_BM = jnp.where(labels_BM == PAD_ID, 0.0, -nll_BM)
    return logprobs_BM.reshape(labels_BSL.shape, out_sharding=out_sharding(act_BLD))


def encoded(
    model: Captioner | CoCa, params: Params, inputs: Array | None, batch: int, length: int
) -> Float[Array, "B P D"]:
    """The memory of images, or what they were encoded to, or for None that of no image, B times.

    Raises `UserError` for texts of a `length` beyond the model's.
    """
    if length > model.config.text_length:
        raise UserError(
            f"captions of {length} tokens: expected at most {model.config.text_length}, the text "
            "length that the model was trained with"
        )
    if inputs is None:
        return null_memory(model, params, batch)
    return model.encode(params, inputs) if inputs.ndim == 4 else inputs


def score_priors(
    model: Captioner | CoCa, params: Params, labels_TL: np.ndarray, multiple: int = 1
) -> np.ndarray:
    """float32 [T, L]: the tokens' log-probabilities without image. Equal texts are read once.

    `multiple` is the number of batch shards, where a mesh is set.
    """
    distinct_TL, inverse_T = np.unique(labels_TL, axis=0, return_inverse=True)
    size = compiled_size(len(distinct_TL), _PRIORS_AT_ONCE, multiple)
    found = []
    for start in range(0, len(distinct_TL), size):
        part = distinct_TL[start : start + size]
        labels_BSL = jnp.asarray(pad_rows(part, size)[:, None])
        found.append(np.asarray(score_tokens(model, params, None, labels_BSL))[: len(part), 0])
    return np.concatenate(found)[inverse_T.reshape(-1)]


def total(logprobs: Values, priors: Values | float = 0.0, alpha: float = 0.0) -> Values:
    """The log-likelihood [...] of captions with the tokens' [..., L], minus alpha * the prior's."""
    return (logprobs - alpha * priors).sum(-1)


def mean(
    logprobs: Values, labels: Values, priors: Values | float = 0.0, alpha: float = 0.0
) -> Values:
    """`total` by the number of tokens (end included), which does not favour short captions."""
    return total(logprobs, priors, alpha) / (labels != PAD_ID).sum(-1).clip(1)
