"""Sampling against closed forms, and its frequencies against the softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capjax.data.tokenizer import PAD_ID
from capjax.decoding import processors, sampling

VOCAB = 6  # ids 0 .. 5; the logits have 8 columns, as they are padded inside the model


def test_log_distribution_is_the_tempered_softmax_over_the_vocabulary():
    logits = np.array([[[1.5, 1.0, 0.5, -1.0, 2.0, 0.0, 9.0, 9.0]]], np.float32)
    for temperature in (0.5, 1.0, 3.0):
        kept = logits[0, 0, :VOCAB].astype(np.float64) / temperature
        expected = np.full(8, -np.inf)
        expected[:VOCAB] = kept - np.log(np.exp(kept).sum())
        logprobs = sampling.log_distribution(jnp.array(logits), VOCAB, temperature)
        np.testing.assert_allclose(logprobs[0, 0], expected, atol=1e-6)


def test_bfloat16_logits_are_normalised_in_float32():
    logits = jax.random.normal(jax.random.key(0), (3, 1, 8), jnp.bfloat16)
    logprobs = sampling.log_distribution(logits, VOCAB)
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(jnp.exp(logprobs).sum(-1), 1.0, atol=1e-6)


def test_entropy_is_that_of_what_is_possible():
    logprobs = sampling.log_distribution(jnp.zeros((1, 2, 8)), VOCAB)
    np.testing.assert_allclose(
        sampling.entropy(logprobs), np.full((1, 2), np.log(VOCAB)), rtol=1e-6
    )
    certain = jnp.where(jnp.arange(8) == 3, 0.0, -jnp.inf)[None, None]
    assert sampling.entropy(certain).tolist() == [[0.0]]


@pytest.mark.parametrize("k", [1, 2, 7, 40])
@pytest.mark.parametrize("size", [8, 128, 384, 4096])
def test_top_tokens_are_those_of_a_sort(k, size):
    """Also with ties, whose lowest ids come first, and with columns that are banned."""
    rng = np.random.default_rng(k)
    scores = rng.integers(0, size // 4, (3, 2, size)).astype(np.float32)
    scores[:, :, rng.integers(0, size, size // 3)] = -np.inf
    k = min(k, size)
    found, ids = sampling.top_tokens(jnp.asarray(scores), k)
    np.testing.assert_array_equal(found, -np.sort(-scores, axis=-1)[..., :k])
    np.testing.assert_array_equal(np.take_along_axis(scores, np.asarray(ids), -1), found)
    assert np.all(np.asarray(ids)[..., 0] == scores.argmax(-1))


def test_frequencies_match_the_softmax():
    """Chi-square with 4 degrees of freedom; 18.5 is the 0.1 % point, and the seed is fixed."""
    num = 20_000
    logits = jnp.array([0.5, 0.3, -0.5, 1.0, 0.0, -2.0, 5.0, 5.0])
    keys = sampling.row_keys(jax.random.key(0), jnp.arange(num // 2), 2)
    for temperature in (0.7, 1.0, 2.0):
        logprobs = sampling.log_distribution(logits[None, None], VOCAB, temperature)
        rows = jnp.tile(processors.ban_padding(logprobs), (num // 2, 2, 1))
        tokens = jax.jit(sampling.draw)(rows, keys)
        counts = np.bincount(np.asarray(tokens).ravel(), minlength=8)
        assert counts[PAD_ID] == counts[VOCAB:].sum() == 0
        probabilities = np.exp(np.asarray(logprobs, np.float64))[0, 0, 1:VOCAB]
        expected = num * probabilities / probabilities.sum()
        chi_square = ((counts[1:VOCAB] - expected) ** 2 / expected).sum()
        assert chi_square < 18.5
        picked = sampling.pick(rows, tokens)
        np.testing.assert_array_equal(picked, np.asarray(logprobs)[0, 0, np.asarray(tokens)])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.one_of(st.just(-np.inf), st.floats(-60, 5, width=32)), min_size=384, max_size=384),
    st.integers(0, 2**31),
)
def test_only_what_is_possible_is_drawn(scores, seed):
    scores[200] = 0.0
    rows = jnp.tile(jnp.asarray(scores, jnp.float32), (1, 64, 1))
    keys = sampling.row_keys(jax.random.key(seed), jnp.arange(1), 64)
    tokens = np.asarray(sampling.draw(rows, keys))
    assert np.all(np.asarray(scores)[tokens] > -np.inf)


def test_frequencies_over_many_blocks():
    """Chi-square with 511 degrees of freedom; 614 is the 0.1 % point, and the seed is fixed."""
    num = 200_000
    scores = np.random.default_rng(0).normal(size=512).astype(np.float32)
    keys = sampling.row_keys(jax.random.key(3), jnp.arange(num // 1000), 1000)
    rows = jnp.broadcast_to(jnp.asarray(scores), (num // 1000, 1000, 512))
    counts = np.bincount(np.asarray(jax.jit(sampling.draw)(rows, keys)).ravel(), minlength=512)
    expected = num * np.exp(scores) / np.exp(scores).sum()
    assert ((counts - expected) ** 2 / expected).sum() < 614


def test_draws_follow_the_index_the_row_and_the_step():
    logprobs = jnp.log(jnp.full((5, 2, 16), 1 / 16))
    keys = sampling.row_keys(jax.random.key(0), jnp.array([3, 1, 4, 1, 5]), 2)
    draw = jax.jit(lambda step: sampling.draw(logprobs, sampling.step_keys(keys, step)))
    series = np.stack([draw(step) for step in range(12)])
    np.testing.assert_array_equal(series[:, 1], series[:, 3])  # the same index
    assert len({tuple(row) for row in series.reshape(12, 10).T}) == 8
    assert len({tuple(row) for row in series.reshape(12, 10)}) == 12  # every step draws anew
    alone = sampling.row_keys(jax.random.key(0), jnp.array([4]))
    np.testing.assert_array_equal(jax.random.key_data(alone[0, 0]), jax.random.key_data(keys[2, 0]))


def kept(scores) -> list[int]:
    return np.flatnonzero(np.asarray(scores)[0, 0] > -np.inf).tolist()


PROBS = np.array([0.05, 0.4, 0.1, 0.25, 0.2])


@pytest.mark.parametrize(
    ("top_p", "ids"),
    [
        (0.01, [1]),
        (0.4, [1]),
        (0.41, [1, 3]),
        (0.65, [1, 3]),
        (0.66, [1, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_have_it(top_p, ids):
    scores = jnp.log(jnp.asarray(PROBS, jnp.float32))[None, None]
    assert kept(sampling.keep_top_p(scores, jnp.float32(top_p - 1e-6))) == ids


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-20, 5, width=32), min_size=128, max_size=128), st.floats(0.01, 0.99))
def test_top_p_is_that_of_a_sort(logits, top_p):
    scores = jnp.asarray(logits, jnp.float32)[None, None]
    probs = np.asarray(jax.nn.softmax(scores), np.float64)[0, 0]
    found = kept(sampling.keep_top_p(scores, jnp.float32(top_p)))
    assert probs[found].sum() >= top_p - 1e-5
    least = probs[found].min()
    assert probs[probs > least].sum() < top_p + 1e-5  # without the least probable ones: too few
    assert set(found) == set(np.flatnonzero(probs >= least))


def test_top_k_and_min_p_keep_what_they_say():
    scores = jnp.log(jnp.asarray(PROBS, jnp.float32))[None, None]
    assert kept(sampling.keep_top_k(scores, 2)) == [1, 3]
    assert kept(sampling.keep_top_k(scores, 99)) == [0, 1, 2, 3, 4]
    assert kept(sampling.keep_min_p(scores, jnp.float32(0.45))) == [1, 3, 4]
    assert kept(sampling.keep_min_p(scores, jnp.float32(1.0))) == [1]
