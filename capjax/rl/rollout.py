"""Captions sampled from the policy, and how probable a policy finds them.

Captions may stand behind a prefix, ids that are given and not drawn: the model reads them, and they
are no part of what is sampled, scored or rewarded.

Letters beyond `capjax.dims`: K captions of an image, R rows, the captions of all images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from capjax.data.tokenizer import PAD_ID
from capjax.decoding.generate import generate
from capjax.decoding.options import DecodingOptions
from capjax.decoding.prefix import forced
from capjax.decoding.sampling import entropy
from capjax.dims import Array, Bool, Float, Int, Params, PRNGKeyArray
from capjax.models.captioner import Captioner
from capjax.objectives.caption_rows import decoder_inputs, repeat
from capjax.objectives.cross_entropy import token_nll
from capjax.objectives.parallel_draw import as_rows


class Rollout(NamedTuple):
    """Captions as the tokenizer writes labels: ids, the end where one was written, then PAD.

    `logprobs_BKL` are of the distribution sampled from, 0 at padding.
    """

    tokens_BKL: Int[Array, "B K L"]
    logprobs_BKL: Float[Array, "B K L"]


def sample(
    model: Captioner,
    params: Params,
    memory_BPD: Float[Array, "B P D"],
    position_B: Array,
    mask_B: Bool[Array, "B"],
    key: PRNGKeyArray,
    *,
    num_samples: int,
    temperature: float = 1.0,
    max_length: int | None = None,
    prefix: Sequence[int] = (),
) -> Rollout:
    """`num_samples` captions of each image; a temperature of 0 gives the greedy one, K = 1.

    Draws depend on `key`, the image's position in the stream and the caption's number alone, so
    not on the mesh. Rows that `mask_B` leaves out are padding throughout. Nothing is differentiated
    through. L is `max_length`, by default what `prefix` leaves of the model's text length.
    """
    max_length = max_length or model.config.text_length - len(prefix)
    options = DecodingOptions(
        temperature=temperature,
        num_captions=num_samples if temperature else 1,
        max_length=len(prefix) + max_length,
    )
    params, memory_BPD = lax.stop_gradient((params, memory_BPD))
    made = generate(
        model,
        params,
        memory_BPD,
        options,
        index_B=position_B,
        key=key,
        mask_B=mask_B,
        forced_BL=forced(prefix, len(memory_BPD)),
    )
    return Rollout(*(x[:, :, len(prefix) :] for x in (made.tokens_BSL, made.logprobs_BSL)))


def token_logprobs(
    model: Captioner,
    params: Params,
    memory_BPD: Float[Array, "B P D"],
    tokens_BKL: Int[Array, "B K L"],
    temperature: float = 1.0,
    prefix: Sequence[int] = (),
) -> tuple[Float[Array, "B K L"], Float[Array, "R L E"]]:
    """(log p of each token under softmax(logits / temperature), the decoder's states).

    0 at padding. With the temperature and prefix of `sample` these are its `logprobs_BKL`, to
    rounding. A temperature of 0 (greedy captions) counts as 1. Differentiable.
    """
    num_captions = tokens_BKL.shape[1]
    labels_RL = as_rows(tokens_BKL, (-1, tokens_BKL.shape[2]))
    memory_RPD = repeat(memory_BPD, num_captions)
    read_RL = decoder_inputs(_behind(prefix, labels_RL), None, model.mask_id)
    hidden_RLE = model.hidden(params, read_RL, memory_RPD)[:, len(prefix) :]
    kernel_EV, bias_V = model.output_head(params)
    warmth = temperature or 1.0
    nll_RL = token_nll(
        hidden_RLE,
        kernel_EV / warmth,
        bias_V / warmth,
        labels_RL,
        vocab_size=model.config.vocab_size,
    )
    logprobs_RL = jnp.where(labels_RL == PAD_ID, 0.0, -nll_RL)
    return as_rows(logprobs_RL, tokens_BKL.shape), hidden_RLE


def _behind(prefix: Sequence[int], labels_RL: Array) -> Array:
    """[R, P + L]: the prefix and the labels."""
    if not prefix:
        return labels_RL
    front_RP = jnp.zeros_like(labels_RL[:, :1]) + jnp.array(prefix, labels_RL.dtype)[None]
    return jnp.concatenate([front_RP, labels_RL], 1)


def token_entropy(
    model: Captioner,
    params: Params,
    hidden_RLE: Float[Array, "R L E"],
    temperature: float = 1.0,
) -> Float[Array, "R L"]:
    """Nats of each position's distribution, the logits of one position of all rows at a time."""

    @jax.checkpoint
    def at_position(hidden_RE):
        logits_R1V = model.logits(params, hidden_RE[:, None]) / (temperature or 1.0)
        return entropy(jax.nn.log_softmax(logits_R1V))[:, 0]

    entropy_LR = lax.map(at_position, jnp.swapaxes(hidden_RLE, 0, 1))
    return jnp.swapaxes(entropy_LR, 0, 1)
