"""Maps of tokens joined to maps of words, and the file of them."""

import itertools
import json

import numpy as np
import pytest

from capjax.data.sources import open_source
from capjax.data.tokenizer import Tokenizer
from capjax.evaluation.attention import word_maps, write_word_maps


@pytest.fixture(scope="module")
def phrases():
    """A tokenizer whose pieces may be phrases."""
    source = open_source("emoji:composition")
    texts = [source[i].captions[0].text for i in range(len(source))]
    return Tokenizer.train([*texts, "cat and dog"], 500, split_by_whitespace=False)


@pytest.mark.parametrize("text", ["woman: dark skin tone", "żaba, dog 😀 cat", "😀😀 x", ""])
def test_words_have_the_mean_of_the_tokens_that_spell_them(phrases, text):
    ids = phrases.encode(text, 64).tolist()
    ids = ids[: ids.index(1)]
    found = word_maps(phrases, ids, np.eye(64)[:, : len(ids) or 1], (1, len(ids) or 1))
    assert found.words == text.split()
    assert found.weights.shape == (len(found.words), len(ids) or 1)
    spelt = [  # a token spells a word if the word changes where the token is left out
        {i for i, kept in enumerate(row) if kept} for row in found.weights
    ]
    for word, tokens in zip(found.words, spelt, strict=True):
        first, last = min(tokens), max(tokens)
        assert word in phrases.decode(ids[first:]) or "\ufffd" in phrases.decode(ids[first:])
        assert tokens == set(range(first, last + 1))
    assert all(min(a) <= min(b) for a, b in itertools.pairwise(spelt))


def test_a_piece_of_several_words_is_shared(phrases):
    ids = phrases.encode("woman: dark skin tone", 16).tolist()
    ids = ids[: ids.index(1)]
    phrase = next(i for i in range(len(ids)) if "skin tone" in phrases.decode(ids[i : i + 1]))
    weights = np.zeros((16, 4))
    weights[:phrase] = [0.0, 0.5, 0.25, 0.0]
    weights[phrase] = [1.0, 0.0, 0.0, 0.0]
    found = word_maps(phrases, ids, weights, (2, 2))
    assert found.words == ["woman:", "dark", "skin", "tone"]
    np.testing.assert_array_equal(found.weights[0], [0, 255, 128, 0])
    np.testing.assert_array_equal(found.weights[2:], [[255, 0, 0, 0]] * 2)


def test_the_file(phrases, tmp_path):
    ids = phrases.encode("cat and dog", 16).tolist()[:-1]
    found = word_maps(phrases, ids[: ids.index(1)], np.ones((16, 6)), (2, 3))
    write_word_maps(tmp_path / "val.json", {"a/1": found})
    assert json.loads((tmp_path / "val.json").read_text()) == {
        "a/1": {"words": ["cat", "and", "dog"], "grid": [2, 3], "weights": [[255] * 6] * 3}
    }
