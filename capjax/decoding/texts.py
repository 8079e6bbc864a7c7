"""The texts that are being written: S rows of an image side by side."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.decoding import processors, sampling
from capjax.dims import Array, Bool, Float, Int
from capjax.mesh import act_BLD, out_sharding

# Why a text ends; `Generated.finish_BS` is an index of it. Absent are rows that are left out.
FINISH_REASONS = ("length", "end", "stop", "absent")
LENGTH, END, STOP, ABSENT = range(4)


class Texts(NamedTuple):
    """What is written so far."""

    tokens_BSL: Int[Array, "B S L"]  # PAD after the end
    logprobs_BSL: Float[Array, "B S L"]  # of each token; 0 where it was forced, and after the end
    entropies_BSL: Float[Array, "B S L"]  # of what each token was chosen from, in nats
    finish_BS: Int[Array, "B S"]  # LENGTH while it goes on


class Position(NamedTuple):
    """What is known of the next token of each row."""

    index: Int[Array, ""]
    logprobs_BSV: Float[Array, "B S V"]  # of the guided, tempered distribution
    scores_BSV: Float[Array, "B S V"]  # of what may be chosen; -inf elsewhere
    hidden_BSE: Float[Array, "B S E"]
    is_forced_B: Bool[Array, "B"]
    stop_MW: Int[Array, "M W"] | None


def no_texts(batch: int, num_rows: int, length: int, mask_B: Bool[Array, "B"]) -> Texts:
    """Texts without a token; rows that the mask leaves out are done."""
    zeros_BSL = jnp.zeros((batch, num_rows, length), out_sharding=out_sharding(act_BLD))
    finish_BS = zeros_BSL[:, :, 0].astype(jnp.int32)
    finish_BS = jnp.where(mask_B[:, None], finish_BS, ABSENT)
    return Texts(zeros_BSL.astype(jnp.int32) + PAD_ID, zeros_BSL, zeros_BSL, finish_BS)


def write(
    texts: Texts,
    position: Position,
    token_BS: Int[Array, "B S"],
    logprob_BS: Float[Array, "B S"],
    entropy_BS: Float[Array, "B S"],
) -> Texts:
    """The texts with one more token each, but for those that are done."""
    is_done_BS = texts.finish_BS != LENGTH
    logprob_BS = jnp.where(position.is_forced_B[:, None], 0.0, logprob_BS)

    def put(old_BSL, new_BS, empty):
        new_BS = jnp.where(is_done_BS, empty, new_BS)
        return lax.dynamic_update_index_in_dim(old_BSL, new_BS, position.index, axis=2)

    tokens_BSL = put(texts.tokens_BSL, token_BS, PAD_ID)
    finish_BS = jnp.where(token_BS == EOS_ID, END, LENGTH)
    if position.stop_MW is not None:
        is_stop_BS = processors.ends_with_any(tokens_BSL, position.index + 1, position.stop_MW)
        is_stop_BS = is_stop_BS & ~position.is_forced_B[:, None]
        finish_BS = jnp.where((finish_BS == LENGTH) & is_stop_BS, STOP, finish_BS)
    return Texts(
        tokens_BSL,
        put(texts.logprobs_BSL, logprob_BS, 0.0),
        put(texts.entropies_BSL, entropy_BS, 0.0),
        jnp.where(is_done_BS, texts.finish_BS, finish_BS),
    )


def take_rows(tree, row_BC: Int[Array, "B C"]):
    """Row row[b, c] of every array [B, S, ...] in the tree, as [B, C, ...]."""

    def take(x):
        index = row_BC.reshape(row_BC.shape + (1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    return jax.tree.map(take, tree)


def entropies(position: Position) -> Float[Array, "B S"]:
    """Of the distributions the next tokens are chosen from."""
    return sampling.entropy(position.logprobs_BSV)
