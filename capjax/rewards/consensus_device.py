"""CIDEr-D of sampled captions on the device: on token ids, n-grams known by two 32-bit hashes.

The same number as `capjax.rewards.consensus.cider_d` of the same ids to float32, in static shapes:
n-grams are compared place by place, and weighed by a table of the training set's document
frequencies. On subwords this is another metric than on words: a reward, never a figure to report.
An n-gram that no reference holds is taken for one of the table if both hashes are equal: with 10^6
n-grams in the table, once in 2 * 10^13 look-ups; one hash alone would be once in 4,000.

Vedantam, Zitnick and Parikh 2015. Letters: B images, K captions an image, R references of each,
J = K + R, L positions (I and M too), G n-grams of the table, N orders.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Float, Int, UInt
from capjax.mesh import BATCH, out_sharding
from capjax.rewards.consensus import (
    MAX_ORDER,
    SIGMA,
    DocumentFrequencies,
    document_frequencies,
)

# Odd multipliers, and where each hash begins: Knuth's, and MurmurHash3's.
_MULTIPLIERS = np.array([[2654435761, 3266489917], [2246822519, 3432918353]], np.uint32)
_STARTS = np.array([668265263, 374761393], np.uint32)


class NgramTable(NamedTuple):
    """Document frequencies by hash, for the device; no leaf trains, all are replicated.

    first_G, second_G: uint32, the hashes, sorted by the first, then by the second.
    weight_G: float32, log(images / images that hold the n-gram).
    log_images: float32, the weight of an n-gram that none holds.
    """

    first_G: UInt[Array | np.ndarray, "G"]
    second_G: UInt[Array | np.ndarray, "G"]
    weight_G: Float[Array | np.ndarray, "G"]
    log_images: Float[Array | np.ndarray, ""]


def ngram_table(labels: Iterable[np.ndarray]) -> NgramTable:
    """The table of a training set, in NumPy: of each image its references as int [R, L].

    They are as the tokenizer encodes captions, and as the device gets them: ids, the end, padding.
    Raises `ValueError` where there is no image.
    """
    frequencies = document_frequencies(
        [[row[row != PAD_ID].tolist() for row in image] for image in labels]
    )
    return hashed(frequencies)


def hashed(frequencies: DocumentFrequencies) -> NgramTable:
    """The frequencies of n-grams of token ids, as a table in NumPy."""
    ids = np.array(list(frequencies.words), np.uint32)
    columns, hashes, weights = [ids], [], []
    for keys, counts in zip(frequencies.keys, frequencies.counts, strict=True):
        if hashes:
            first, last = np.divmod(keys, len(ids))
            columns = [*(column[first] for column in columns), ids[last]]
        hashes.append(_hashes(columns))
        weights.append(np.log(frequencies.num_documents) - np.log(np.maximum(1, counts)))
    first_G, second_G = (np.concatenate(parts) for parts in zip(*hashes, strict=True))
    order_G = np.lexsort((second_G, first_G))
    return NgramTable(
        first_G[order_G],
        second_G[order_G],
        np.concatenate(weights)[order_G].astype(np.float32),
        np.array(np.log(frequencies.num_documents), np.float32),
    )


def cider_d(
    tokens_BKL: Int[Array, "B K L"], references_BRM: Int[Array, "B R M"], table: NgramTable
) -> Float[Array, "B K"]:
    """CIDEr-D of each caption, in [0, 10].

    Args:
      tokens_BKL: padded behind the end, which is a token like others; a caption that was cut has
        none. references_BRM: padded likewise; a row of padding alone is no reference, and an image
        without any scores 0.
    """
    K, length = tokens_BKL.shape[1], max(tokens_BKL.shape[2], references_BRM.shape[2])
    sentences_BJL = jnp.concatenate(
        [_padded(tokens_BKL, length), _padded(references_BRM, length)], 1
    )
    count_BJ = jnp.sum(sentences_BJL != PAD_ID, -1)
    tokens = [_shifted(sentences_BJL, by).astype(jnp.uint32) for by in range(MAX_ORDER)]
    hashes = [_hashes(tokens[:order]) for order in range(1, MAX_ORDER + 1)]
    first_BJLN, second_BJLN = (jnp.stack(parts, -1) for parts in zip(*hashes, strict=True))
    weight_BJLN = _weights(first_BJLN, second_BJLN, table)
    total_BKR = 0.0
    for order, hashes_BJL in enumerate(hashes, 1):
        is_ngram_BJL = jnp.arange(length)[None, None] + order <= count_BJ[..., None]
        weight_BJL = jnp.where(is_ngram_BJL, weight_BJLN[..., order - 1], 0)
        total_BKR += _cosines(hashes_BJL, weight_BJL, K)
    apart_BKR = count_BJ[:, :K, None] - count_BJ[:, None, K:]
    total_BKR *= jnp.exp(-(apart_BKR**2) / (2 * SIGMA**2)) / MAX_ORDER
    is_reference_BR = count_BJ[:, K:] > 0
    sum_BK = jnp.sum(jnp.where(is_reference_BR[:, None], total_BKR, 0), -1)
    return 10 * sum_BK / jnp.maximum(jnp.sum(is_reference_BR, -1), 1)[:, None]


def _cosines(hashes_BJL: tuple[Array, Array], weight_BJL: Array, K: int) -> Array:
    """float32 [B, K, R]: the clipped cosines of one order of n-grams; those of weight 0 are none.

    A sum over the different n-grams of a sentence is one over its places, each over how often its
    n-gram occurs. What reaches into the padding is no n-gram, and equal to none.
    """
    own_BJL = _occurrences(hashes_BJL, [x[:, :, None] for x in hashes_BJL])[..., 0]
    norm_BJ = jnp.sqrt(jnp.sum(own_BJL * weight_BJL**2, -1))
    own_BKL1 = own_BJL[:, :K, :, None]
    theirs_BKLR = _occurrences([x[:, :K] for x in hashes_BJL], [x[:, None, K:] for x in hashes_BJL])
    share_BKL1 = weight_BJL[:, :K, :, None] ** 2 / jnp.maximum(own_BKL1, 1)
    dots_BKR = jnp.sum(share_BKL1 * jnp.minimum(own_BKL1, theirs_BKLR) * theirs_BKLR, 2)
    scale_BKR = norm_BJ[:, :K, None] * norm_BJ[:, None, K:]
    return jnp.where(scale_BKR > 0, dots_BKR / jnp.where(scale_BKR > 0, scale_BKR, 1), 0)


def _occurrences(hashes, among) -> Array:
    """float32 [B, J, L, R]: how often each n-gram [B, J, L] is among those of [B, J or 1, R, M]."""
    first, second = (
        ours_BJL[..., None, None] == theirs_BJRM[:, :, None]
        for ours_BJL, theirs_BJRM in zip(hashes, among, strict=True)
    )
    return jnp.sum(first & second, -1, dtype=jnp.float32)


def _weights(first: Array, second: Array, table: NgramTable) -> Array:
    """The weight of each n-gram [B, ...] in the table, by a binary search for both hashes."""
    num_steps = len(table.weight_G).bit_length()
    spec = out_sharding(P(BATCH, *(None,) * (first.ndim - 1)))

    def at(values_G, place):
        return jnp.asarray(values_G).at[place].get(out_sharding=spec, mode="clip")

    def advance(number, place):
        """At least `place` entries come before the n-gram; see whether 2^i more do.

        Beyond the table stands its last entry: what that comes before is not in the table.
        """
        further = place + (1 << (num_steps - 1 - number))
        entry = (at(table.first_G, further - 1), at(table.second_G, further - 1))
        is_before = (entry[0] < first) | ((entry[0] == first) & (entry[1] < second))
        return jnp.where(is_before, further, place)

    place = lax.fori_loop(0, num_steps, advance, jnp.zeros_like(first, jnp.int32))
    is_known = (at(table.first_G, place) == first) & (at(table.second_G, place) == second)
    return jnp.where(is_known, at(table.weight_G, place), table.log_images)


def _hashes(columns: Sequence[Any]) -> tuple[Any, Any]:
    """Two uint32 hashes of n-grams, whose tokens are in so many uint32 arrays, of NumPy or JAX."""
    found = []
    for start, (of_token, of_state) in zip(_STARTS, _MULTIPLIERS, strict=True):
        state = start + np.uint32(len(columns))
        for column in columns:
            state = (state ^ (column * of_token)) * of_state
            state = state ^ (state >> np.uint32(15))
        found.append(state)
    return found[0], found[1]


def _padded(tokens_BKL: Array, length: int) -> Array:
    return jnp.pad(tokens_BKL, ((0, 0), (0, 0), (0, length - tokens_BKL.shape[2])))


def _shifted(tokens_BJL: Array, by: int) -> Array:
    """Each place's token is the one that stood `by` places on; padding at the end."""
    length = tokens_BJL.shape[2]
    return _padded(tokens_BJL[:, :, min(by, length) :], length)
