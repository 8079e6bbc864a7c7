"""Each rule about what may be written, against a plain reading of the text."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capjax.data.tokenizer import EOS_ID
from capjax.decoding import processors

VOCAB, LENGTH = 8, 10
FLAT = jnp.full((1, 1, VOCAB), -np.log(VOCAB), jnp.float32)

texts = st.lists(st.integers(2, 5), min_size=0, max_size=LENGTH - 1)


def padded(text: list[int]):
    return jnp.asarray([[text + [0] * (LENGTH - len(text))]], jnp.int32)


def banned(scores) -> set[int]:
    return set(np.flatnonzero(np.isneginf(np.asarray(scores)[0, 0])).tolist())


def test_padding_is_never_written_and_an_end_not_too_early():
    assert banned(processors.ban_padding(FLAT)) == {0}
    assert banned(processors.ban_end(FLAT, jnp.asarray(True))) == {EOS_ID}
    assert banned(processors.ban_end(FLAT, jnp.asarray(False))) == set()


@settings(max_examples=30, deadline=None)
@given(texts, st.integers(1, 4))
def test_no_ngram_twice(text, size):
    expected = set()
    for start in range(len(text) - size + 1):
        window = text[start : start + size]
        if window[:-1] == text[len(text) - size + 1 :]:
            expected.add(window[-1])
    found = processors.ban_repeated_ngrams(FLAT, padded(text), jnp.asarray(len(text)), size)
    assert banned(found) == expected


def test_ngrams_longer_than_the_text_never_repeat():
    assert banned(processors.ban_repeated_ngrams(FLAT, padded([2]), jnp.asarray(1), 99)) == set()


@settings(max_examples=30, deadline=None)
@given(texts, st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=3), min_size=1, max_size=4))
def test_banned_sequences_and_stops(text, sequences):
    arrays = jnp.asarray(processors.pad_sequences(sequences))
    found = processors.ban_sequences(FLAT, padded(text), jnp.asarray(len(text)), arrays)
    expected = {
        s[-1]
        for s in sequences
        if (text[len(text) - len(s) + 1 :] if s[1:] else []) == s[:-1] and len(text) >= len(s) - 1
    }
    assert banned(found) == expected
    is_stop = processors.ends_with_any(padded(text), jnp.asarray(len(text)), arrays)
    assert bool(is_stop[0, 0]) == any(text[-len(s) :] == s for s in sequences)


def test_repetition_multiplies_the_log_probability_of_what_is_there():
    found = processors.penalize_repetition(FLAT, padded([3, 5, 3]), jnp.float32(1.5))
    expected = np.full(VOCAB, -np.log(VOCAB))
    expected[[3, 5]] *= 1.5
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-6)


def test_forced_tokens_cost_nothing_and_free_rows_keep_their_scores():
    found = processors.force(jnp.tile(FLAT, (2, 1, 1)), jnp.array([4, 0]))
    assert banned(found[:1]) == set(range(VOCAB)) - {4}
    assert found[0, 0, 4] == 0
    np.testing.assert_array_equal(found[1], FLAT[0])


def test_no_sequences_are_no_rule():
    assert processors.pad_sequences([]) is None
    with pytest.raises(ValueError):
        processors.pad_sequences([[]]).reshape(1, 1)
