"""Guidance: the logits of several branches joined into those that tokens are chosen by.

Any of them may be shifted by a constant a row: a softmax follows.
"""

import jax.numpy as jnp

from capjax.data.tokenizer import EOS_ID
from capjax.dims import Array, Float


def guided(
    logits_BSV: Float[Array, "B S V"],
    contrast_BSV: Float[Array, "B S V"],
    scale: float | Float[Array, ""],
) -> Float[Array, "B S V"]:
    """contrast + scale * (logits - contrast): classifier-free guidance.

    Kornblith et al. 2023, equation 3. Scale 1 gives the logits bit for bit, 0 those of the contrast
    (no image, or another one).
    """
    joined_BSV = contrast_BSV + scale * (logits_BSV - contrast_BSV)
    return jnp.where(scale == 1, logits_BSV, joined_BSV)


def language_model_guided(
    logits_BSV: Float[Array, "B S V"],
    contrast_BSV: Float[Array, "B S V"],
    language_BSV: Float[Array, "B S V"],
    alpha: float | Float[Array, ""],
    beta: float | Float[Array, ""],
) -> Float[Array, "B S V"]:
    """language + alpha * logits - beta * contrast (Kornblith et al. 2023, section 3.3)."""
    return language_BSV + alpha * logits_BSV - beta * contrast_BSV


def newline_ends(logits_BSV: Float[Array, "B S V"], newline_id: int) -> Float[Array, "B S V"]:
    """Moves the probability of a newline to the end of the caption.

    For language models whose prompt is captions on lines of their own (ibid., appendix A.3).
    """
    ids_V = jnp.arange(logits_BSV.shape[-1])[None, None, :]
    newline_BS1 = logits_BSV[:, :, newline_id, None]
    end_BS1 = jnp.logaddexp(logits_BSV[:, :, EOS_ID, None], newline_BS1)
    logits_BSV = jnp.where(ids_V == EOS_ID, end_BS1, logits_BSV)
    return jnp.where(ids_V == newline_id, -jnp.inf, logits_BSV)
