"""The published vectors of guidance by image dropout and by a language model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.decoding import guidance


def rows(*values):
    return jnp.asarray(values, jnp.float32)[None, None]


CONDITIONAL, UNCONDITIONAL = rows(2, 1, 0), rows(2, 0, -1)


@pytest.mark.parametrize(
    ("scale", "expected", "best"),
    [(1.0, [2, 1, 0], 0), (1.5, [2, 1.5, 0.5], 0), (2.5, [2, 2.5, 1.5], 1), (3.0, [2, 3, 2], 1)],
)
def test_classifier_free_guidance(scale, expected, best):
    found = guidance.guided(CONDITIONAL, UNCONDITIONAL, scale)
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-6)
    assert int(jnp.argmax(found)) == best
    if scale == 2.5:
        softmax = jax.nn.softmax(found[0, 0])
        np.testing.assert_allclose(softmax, [0.307196, 0.506480, 0.186324], atol=1e-6)


def test_scale_1_is_the_conditional_bit_for_bit_and_0_the_other():
    conditional = jax.random.normal(jax.random.key(0), (2, 3, 50)) * 30
    other = jax.random.normal(jax.random.key(1), (2, 3, 50)) * 1e6
    np.testing.assert_array_equal(guidance.guided(conditional, other, 1.0), conditional)
    np.testing.assert_array_equal(guidance.guided(conditional, other, 0.0), other)


@pytest.mark.parametrize(
    ("alpha", "beta", "expected", "best"),
    [
        (1.0, 1.0, [-1.945828, -1.945828, -0.818900, -np.inf], 2),
        (5.0, 2.5, [-2.506031, -6.506031, -7.506004, -np.inf], 0),
    ],
)
def test_language_model_guidance_with_newlines_that_end(alpha, beta, expected, best, monkeypatch):
    """In the published vector the end is id 2, and the newline 3."""
    monkeypatch.setattr(guidance, "EOS_ID", 2)
    language, conditional, unconditional = (
        jax.nn.log_softmax(rows(*x)) for x in ([0, 1, 0, 2], [1, 0, 0, -5], [0, 0, 0, -5])
    )
    joined = guidance.language_model_guided(conditional, unconditional, language, alpha, beta)
    found = guidance.newline_ends(joined, newline_id=3)
    np.testing.assert_allclose(found[0, 0], expected, atol=2e-6)
    assert int(jnp.argmax(found)) == best
