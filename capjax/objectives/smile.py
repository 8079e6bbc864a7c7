"""SMILE: the softmax over the words of a caption's own label, so that richness is not punished.

Likelihood asks at every position for one word against the whole vocabulary, and so for the words
that most captions share. Restricted to the words of its own label a caption learns their order
alone, and what it could say beside them costs nothing. Source: Yue et al., "Learning Descriptive
Image Captioning via Semipermeable Maximum Likelihood Estimation" (2023), and its code.

Letters beyond `capjax.dims`: R rows; S the labels of the same row, as candidates.
"""

import jax
import jax.numpy as jnp
from jax import lax

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Bool, Float, Int
from capjax.objectives.cross_entropy import Split, per_device, token_nll

_EXCLUDED = -1e9  # a logit; finite, as rows without labels have no other


def smile_nll(
    hidden_RLE: Float[Array, "R L E"],
    kernel_EV: Float[Array, "E V"],
    bias_V: Float[Array, "V"],
    labels_RL: Int[Array, "R L"],
    *,
    vocab_size: int,
    subset: str = "label",
) -> Float[Array, "R L"]:
    """-log p(label) in nats where p is a softmax over a subset; 0 where the label is padding.

    The subset: "label", the ids of the row's label, each once; "reverse", all but those and the
    label itself. Never more than `token_nll` of the same arguments. Logits are made of the columns
    of the row's own labels, [R, L, L]; "reverse" needs `token_nll` besides. Differentiable.
    """
    arguments = (hidden_RLE, kernel_EV, bias_V)
    _, logits_RLS = per_device(_own_logits, *arguments, (labels_RL,))
    is_real_RL = labels_RL != PAD_ID
    is_same_RLS = labels_RL[:, :, None] == labels_RL[:, None, :]
    is_candidate_RLS = (is_real_RL & is_first(labels_RL))[:, None, :]
    label_logit_RL = jnp.diagonal(logits_RLS, axis1=1, axis2=2)
    if subset == "label":
        candidates_RLS = jnp.where(is_candidate_RLS, logits_RLS, _EXCLUDED)
        return jnp.where(is_real_RL, jax.nn.logsumexp(candidates_RLS, -1) - label_logit_RL, 0)
    others_RLS = jnp.where(is_candidate_RLS & ~is_same_RLS, logits_RLS, _EXCLUDED)
    nll_RL = token_nll(*arguments, labels_RL, vocab_size=vocab_size)
    # Less than 1, as the label itself is not among them; but rounded it may be 1.
    share_RL = jnp.exp(jax.nn.logsumexp(others_RLS, -1) - label_logit_RL - nll_RL)
    return jnp.where(is_real_RL, nll_RL + jnp.log1p(-jnp.minimum(share_RL, 1 - 1e-6)), 0)


def is_first(labels_RL: Int[Array, "R L"]) -> Bool[Array, "R L"]:
    """Whether a label occurs in its row for the first time."""
    is_same_RLS = labels_RL[:, :, None] == labels_RL[:, None, :]
    position_L = jnp.arange(labels_RL.shape[1])
    return ~jnp.any(is_same_RLS & (position_L[None, :] < position_L[:, None])[None], -1)


def _own_logits(split: Split, hidden_RLE, kernel_EV, bias_V, rows):
    """(None, [R, L, S]): at every position the logits of all labels of the row."""
    (labels_RS,) = rows
    V = bias_V.shape[0]
    columns_RS = labels_RS - (V * lax.axis_index(split.vocab_axis) if split.vocab_axis else 0)
    kernel_ERS = jnp.take(kernel_EV, columns_RS, axis=1, mode="clip").astype(hidden_RLE.dtype)
    logits_RLS = jnp.einsum(
        "rle,ers->rls", hidden_RLE, kernel_ERS, preferred_element_type=jnp.float32
    )
    logits_RLS += jnp.take(bias_V, columns_RS, mode="clip")[:, None, :]
    if split.vocab_axis:
        is_here_RS = (columns_RS >= 0) & (columns_RS < V)
        logits_RLS = lax.psum(jnp.where(is_here_RS[:, None, :], logits_RLS, 0), split.vocab_axis)
    return None, logits_RLS
