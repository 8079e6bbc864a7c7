"""The captions of a batch as rows: their modes, what the decoder reads, what is scored.

Letters beyond `capjax.dims`: R rows, the captions of all images; G groups of J consecutive rows.
Caption k of K of an image at position p of the stream is a row at position p * K + k.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Batch, Bool, Int, PRNGKeyArray
from capjax.objectives.captioning_objective import CaptioningObjective
from capjax.objectives.parallel_draw import (
    are_parallel,
    as_rows,
    draw_masked,
    draw_orders,
    draw_rows,
)

# What keys of other draws are folded from: numbers that are no position in practice.
_DROPOUT, _MASKING = 0xFFFFFFFF, 0xFFFFFFFE


class CaptionRows(NamedTuple):
    """The captions of a batch, and what was drawn for them."""

    labels_RL: Int[Array, "R L"]
    is_parallel_R: Bool[Array, "R"]
    is_masked_RL: Bool[Array, "R L"] | None  # None: parallel rows are masked throughout
    is_scored_RL: Bool[Array, "R L"]


def draw_caption_rows(
    batch: Batch, key: PRNGKeyArray, objective: CaptioningObjective
) -> tuple[CaptionRows, Int[Array, "G J"] | None]:
    """The rows, and for the fixed draw the order of each group, its causal rows first."""
    tokens, position_B = batch["tokens"], batch["position"]
    num_captions = tokens.shape[1] if tokens.ndim == 3 else 1
    labels_RL = as_rows(tokens, (-1, tokens.shape[-1]))
    number_1K = jnp.arange(num_captions, dtype=position_B.dtype)[None]
    position_R = as_rows(position_B[:, None] * num_captions + number_1K, (-1,))
    orders_GJ, is_masked_RL, is_scored_RL = None, None, labels_RL != PAD_ID
    if not objective.is_mixed:
        is_parallel_R = jnp.full_like(position_R, objective.parallel_fraction, bool)
    elif objective.parallel_draw == "fixed":
        orders_GJ = draw_orders(key, position_R, objective.group_size)
        is_parallel_R = are_parallel(orders_GJ, objective.group_causal)
    else:
        is_parallel_R = draw_rows(key, position_R, objective.parallel_fraction)
    if objective.parallel_fraction and objective.masking_ratio < 1:
        is_masked_RL = draw_masked(
            jax.random.fold_in(key, _MASKING),
            position_R,
            labels_RL,
            objective.masking_ratio,
            among_tokens=not objective.score_visible,
        )
        if not objective.score_visible:
            is_scored_RL &= is_masked_RL | ~is_parallel_R[:, None]
    return CaptionRows(labels_RL, is_parallel_R, is_masked_RL, is_scored_RL), orders_GJ


def draw_dropped(batch: Batch, key: PRNGKeyArray, probability: float) -> Bool[Array, "B"]:
    """The images that their captions do not see; independent of the modes."""
    return draw_rows(jax.random.fold_in(key, _DROPOUT), batch["position"], probability)


def decoder_inputs(
    labels_BL: Int[Array, "B L"],
    is_parallel_B: Bool[Array, "B"] | None,
    mask_id: int,
    is_masked_BL: Bool[Array, "B L"] | None = None,
) -> Int[Array, "B L"]:
    """What the decoder reads: labels shifted right behind a 0, or `mask_id` where parallel.

    Parallel rows read their own labels where `is_masked_BL` is False. None for `is_parallel_B`
    means: every example is causal; for `is_masked_BL`: every position is masked.
    """
    shifted_BL = jnp.pad(labels_BL[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID)
    if is_parallel_B is None:
        return shifted_BL
    masked_BL = jnp.asarray(mask_id, labels_BL.dtype)
    if is_masked_BL is not None:
        masked_BL = jnp.where(is_masked_BL, masked_BL, labels_BL)
    return jnp.where(is_parallel_B[:, None], masked_BL, shifted_BL)


def repeat(tree: Any, times: int) -> Any:
    """Arrays [B, ...] as [B * times, ...]: each image once for each of its captions."""

    def repeat_rows(x):
        x = jnp.broadcast_to(x[:, None], (x.shape[0], times, *x.shape[1:]))
        return as_rows(x, (-1, *x.shape[2:]))

    return tree if times == 1 else jax.tree.map(repeat_rows, tree)
