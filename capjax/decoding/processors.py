"""Rules about what may be written next: functions of scores and of the texts so far.

Scores are log-probabilities, -inf where a token may not be chosen. `tokens_BSL` holds the first
`step` tokens of each text and padding after them. Sequences of ids (M of them, W long) are aligned
at the right and padded with PAD on the left.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.dims import Array, Bool, Float, Int

Scores = Float[Array, "B S V"]


def ban(scores_BSV: Scores, is_banned: Bool[Array, "*#B #S V"]) -> Scores:
    """-inf where banned."""
    return jnp.where(is_banned, -jnp.inf, scores_BSV)


def ban_padding(scores_BSV: Scores) -> Scores:
    """Padding is never written."""
    return ban(scores_BSV, (jnp.arange(scores_BSV.shape[-1]) == PAD_ID)[None, None, :])


def ban_end(scores_BSV: Scores, is_early: Bool[Array, ""]) -> Scores:
    """No end yet, where it is too early for one (`min_length`)."""
    is_end_V = jnp.arange(scores_BSV.shape[-1]) == EOS_ID
    return ban(scores_BSV, (is_end_V & is_early)[None, None, :])


def force(scores_BSV: Scores, token_B: Int[Array, "B"]) -> Scores:
    """Only this token, at no cost; rows whose token is PAD are free."""
    is_token_BV = jnp.arange(scores_BSV.shape[-1])[None, :] == token_B[:, None]
    forced_BV = jnp.where(is_token_BV, 0.0, -jnp.inf)
    is_free_B = token_B == PAD_ID
    return jnp.where(is_free_B[:, None, None], scores_BSV, forced_BV[:, None, :])


def penalize_repetition(
    scores_BSV: Scores, tokens_BSL: Int[Array, "B S L"], penalty: Float[Array, ""]
) -> Scores:
    """Multiplies the log-probability of what the text has already (Keskar et al. 2019, CTRL).

    Of log-probabilities rather than logits, which shift by a constant without meaning.
    """
    is_seen_BSV = _mark(scores_BSV, tokens_BSL, tokens_BSL != PAD_ID)
    return jnp.where(is_seen_BSV, scores_BSV * penalty, scores_BSV)


def ban_repeated_ngrams(
    scores_BSV: Scores, tokens_BSL: Int[Array, "B S L"], step: Int[Array, ""], size: int
) -> Scores:
    """No n-gram of `size` tokens twice in a text."""
    if size > tokens_BSL.shape[2]:
        return scores_BSV
    starts_J = jnp.arange(tokens_BSL.shape[2] - size + 1)
    is_repeat_BSJ = jnp.ones((1, 1, 1), bool) & (starts_J + size <= step)[None, None, :]
    for offset in range(size - 1):
        window_BSJ = tokens_BSL[:, :, offset : offset + len(starts_J)]
        now_BS1 = lax.dynamic_slice_in_dim(tokens_BSL, step - size + 1 + offset, 1, axis=2)
        is_repeat_BSJ = is_repeat_BSJ & (window_BSJ == now_BS1)
    next_BSJ = tokens_BSL[:, :, size - 1 :]
    return ban(scores_BSV, _mark(scores_BSV, next_BSJ, is_repeat_BSJ & (next_BSJ != PAD_ID)))


def ban_sequences(
    scores_BSV: Scores,
    tokens_BSL: Int[Array, "B S L"],
    step: Int[Array, ""],
    sequences_MW: Int[Array, "M W"],
) -> Scores:
    """None of these sequences: its last token is banned where the others stand before it."""
    is_match_BSM = _ends_with(tokens_BSL, step, sequences_MW[:, :-1])
    last_BSM = jnp.broadcast_to(sequences_MW[None, None, :, -1], is_match_BSM.shape)
    return ban(scores_BSV, _mark(scores_BSV, last_BSM, is_match_BSM))


def ends_with_any(
    tokens_BSL: Int[Array, "B S L"], step: Int[Array, ""], sequences_MW: Int[Array, "M W"]
) -> Bool[Array, "B S"]:
    """Whether a text of `step` tokens ends with one of the sequences."""
    return jnp.any(_ends_with(tokens_BSL, step, sequences_MW), axis=-1)


def _ends_with(tokens_BSL, step, sequences_MW) -> Bool[Array, "B S M"]:
    width = sequences_MW.shape[1]
    if not width:
        return jnp.ones((*tokens_BSL.shape[:2], len(sequences_MW)), bool)
    before_BSW = jnp.pad(tokens_BSL, ((0, 0), (0, 0), (width, 0)), constant_values=PAD_ID)
    tail_BSW = lax.dynamic_slice_in_dim(before_BSW, step, width, axis=2)
    wanted_11MW = sequences_MW[None, None]
    is_same_BSMW = (tail_BSW[:, :, None, :] == wanted_11MW) | (wanted_11MW == PAD_ID)
    return jnp.all(is_same_BSMW, axis=-1)


def _mark(like_BSV, ids_BSJ, is_marked_BSJ) -> Bool[Array, "B S V"]:
    """Which ids of the vocabulary are among those marked."""
    ids_V = jnp.arange(like_BSV.shape[-1])[None, None, :]

    def add(j, marks_BSV):
        id_BS = lax.dynamic_index_in_dim(ids_BSJ, j, axis=2)
        is_marked_BS = lax.dynamic_index_in_dim(is_marked_BSJ, j, axis=2)
        return marks_BSV | ((ids_V == id_BS) & is_marked_BS)

    return lax.fori_loop(0, ids_BSJ.shape[2], add, jnp.zeros_like(like_BSV, bool))


def pad_sequences(sequences: list[list[int]]) -> np.ndarray | None:
    """int32 [M, W] of sequences of ids, aligned at the right; None of none."""
    if not sequences:
        return None
    width = max(map(len, sequences))
    rows = [[PAD_ID] * (width - len(ids)) + list(ids) for ids in sequences]
    return np.asarray(rows, np.int32)
