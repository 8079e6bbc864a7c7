"""Sampling against closed forms, and its frequencies against the softmax."""

import jax
import jax.numpy as jnp
import numpy as np

from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.decoding import sampling

VOCAB = 6  # ids 0 .. 5; the logits have 8 columns, as they are padded inside the model


def test_log_distribution_is_the_tempered_softmax_over_the_vocabulary():
    logits = np.array([[1.5, 1.0, 0.5, -1.0, 2.0, 0.0, 9.0, 9.0]], np.float32)
    for temperature in (0.5, 1.0, 3.0):
        kept = logits[0, :VOCAB].astype(np.float64) / temperature
        expected = np.full(8, -np.inf)
        expected[:VOCAB] = kept - np.log(np.exp(kept).sum())
        logprobs = sampling.log_distribution(jnp.array(logits), VOCAB, temperature)
        np.testing.assert_allclose(logprobs[0], expected, atol=1e-6)


def test_bfloat16_logits_are_normalised_in_float32():
    logits = jax.random.normal(jax.random.key(0), (3, 8), jnp.bfloat16)
    logprobs = sampling.log_distribution(logits, VOCAB)
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(jnp.exp(logprobs).sum(-1), 1.0, atol=1e-6)


def test_greedy_takes_the_best_id_that_may_be_chosen():
    logits = jnp.array([[9.0, 3.0, 0.0, 1.0, 2.0, 2.0, 9.0, 9.0]])
    logprobs = sampling.log_distribution(logits, VOCAB)
    total = np.log(np.exp([9.0, 3, 0, 1, 2, 2]).sum())  # the distribution keeps padding's share
    token, logprob = sampling.greedy(sampling.choosable(logprobs))
    assert token.tolist() == [EOS_ID]
    np.testing.assert_allclose(logprob, [3 - total], atol=1e-6)
    token, logprob = sampling.greedy(sampling.choosable(logprobs, ban_eos=True))
    assert token.tolist() == [4]  # the lower id of a tie
    np.testing.assert_allclose(logprob, [2 - total], atol=1e-6)


def test_frequencies_match_the_softmax():
    """Chi-square with 4 degrees of freedom; 18.5 is the 0.1 % point, and the seed is fixed."""
    num = 20_000
    logits = jnp.array([0.5, 0.3, -0.5, 1.0, 0.0, -2.0, 5.0, 5.0])
    keys = sampling.row_keys(jax.random.key(0), jnp.arange(num))
    for temperature in (0.7, 1.0, 2.0):
        logprobs = sampling.log_distribution(logits[None, :], VOCAB, temperature)
        rows = jnp.tile(sampling.choosable(logprobs), (num, 1))
        tokens, drawn = jax.jit(sampling.sample)(rows, keys)
        counts = np.bincount(np.asarray(tokens), minlength=8)
        assert counts[PAD_ID] == counts[VOCAB:].sum() == 0
        probabilities = np.exp(np.asarray(logprobs, np.float64))[0, 1:VOCAB]
        expected = num * probabilities / probabilities.sum()
        chi_square = ((counts[1:VOCAB] - expected) ** 2 / expected).sum()
        assert chi_square < 18.5
        np.testing.assert_array_equal(drawn, np.asarray(logprobs)[0, np.asarray(tokens)])


def test_a_low_temperature_is_greedy():
    logits = jax.random.normal(jax.random.key(1), (64, 8))
    expected, _ = sampling.greedy(sampling.choosable(sampling.log_distribution(logits, VOCAB)))
    keys = sampling.row_keys(jax.random.key(2), jnp.arange(64))
    logprobs = sampling.choosable(sampling.log_distribution(logits, VOCAB, temperature=1e-6))
    token, _ = sampling.sample(logprobs, keys)
    np.testing.assert_array_equal(token, expected)


def test_draws_follow_the_index_and_the_step():
    logprobs = jnp.log(jnp.full((5, 16), 1 / 16))
    keys = sampling.row_keys(jax.random.key(0), jnp.array([3, 1, 4, 1, 5]))
    draw = jax.jit(lambda step: sampling.sample(logprobs, sampling.step_keys(keys, step))[0])
    series = np.stack([draw(step) for step in range(12)])
    np.testing.assert_array_equal(series[:, 1], series[:, 3])  # the same index
    assert len({tuple(row) for row in series.T}) == 4
    assert len({tuple(row) for row in series}) == 12  # every step draws anew
    alone = sampling.row_keys(jax.random.key(0), jnp.array([4]))
    np.testing.assert_array_equal(jax.random.key_data(alone[0]), jax.random.key_data(keys[2]))
