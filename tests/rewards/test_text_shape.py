"""Length and repetition: by hand, on a mesh, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.data.tokenizer import EOS_ID
from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch
from capjax.rewards.text_shape import length_penalty, repetition_penalty


def rows(*captions, length=10, end=True):
    """[1, K, L]: letters as ids from 3, the end behind them."""
    found = np.zeros((1, len(captions), length), np.int32)
    for row, caption in zip(found[0], captions, strict=True):
        ids = [ord(letter) - ord("a") + 3 for letter in caption] + [EOS_ID] * end
        row[: len(ids)] = ids
    return jnp.asarray(found)


def test_length():
    tokens_BKL = rows("", "ab", "abc", "abcd", "abcdef", "abcdefghi")  # 1, 3, 4, 5, 7, 10 tokens
    expected = [[-0.75, -0.25, 0, 0, -0.5, -1]]
    np.testing.assert_array_equal(length_penalty(tokens_BKL, 4, 5, 4.0), expected)


def test_repetition():
    tokens_BKL = rows("abcd", "abab", "aaaa", "abcab", "a", "")
    found = repetition_penalty(tokens_BKL)
    np.testing.assert_allclose(found, [[0, -1 / 3, -2 / 3, -1 / 4, 0, 0]], rtol=1e-6)
    found = repetition_penalty(tokens_BKL, 1)
    np.testing.assert_allclose(found, [[0, -1 / 2, -3 / 4, -2 / 5, 0, 0]], rtol=1e-6)
    found = repetition_penalty(tokens_BKL, 3)
    np.testing.assert_allclose(found, [[0, 0, -1 / 2, 0, 0, 0]], rtol=1e-6)
    cut = rows("abab", length=4, end=False)  # that did not end
    np.testing.assert_allclose(repetition_penalty(cut), [[-1 / 3]], rtol=1e-6)
    np.testing.assert_array_equal(repetition_penalty(cut, 5), [[0]])


def test_eight_devices_as_one():
    tokens = np.random.default_rng(0).integers(0, 6, (8, 2, 7), np.int32)
    expected = [length_penalty(jnp.asarray(tokens), 3, 4), repetition_penalty(jnp.asarray(tokens))]
    mesh = make_mesh(MeshShape(data=4, tensor=2))
    with jax.set_mesh(mesh):
        batch = place_batch(mesh, {"tokens": tokens})
        of_length = functools.partial(length_penalty, shortest=3, longest=4)
        for penalty, by_one in zip((of_length, repetition_penalty), expected, strict=True):
            np.testing.assert_array_equal(jax.jit(penalty)(batch["tokens"]), by_one)


@pytest.mark.parametrize(
    ("penalty", "said"),
    [
        (lambda x: length_penalty(x, 5, 4), "shortest=5, longest=4"),
        (lambda x: length_penalty(x, 4, 5, 0.0), "tolerance=0.0"),
        (lambda x: repetition_penalty(x, 0), "order=0"),
    ],
)
def test_what_is_wrong_is_said(penalty, said):
    with pytest.raises(UserError, match=said):
        penalty(rows("abc"))
