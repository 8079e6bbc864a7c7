"""The grammar head: its formula, that it learns what can be learnt, its file, its features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError
from capjax.models.pooling import unit_norm
from capjax.models.text_encoder import apply_projection
from capjax.rewards.grammar import (
    grammar_logits,
    grammar_score,
    init_grammar_head,
    read_grammar_head,
    write_grammar_head,
)
from capjax.rewards.grammar_training import GrammarTraining, fit_grammar_head
from tests.evaluation.tiny import PREPROCESSING, params, tokenizer, towers

SMALL = GrammarTraining(steps=300, batch_size=64, learning_rate=3e-3, hidden_width=16)
ORDER = "abcdefghijkl"


def test_the_score_is_the_softmax_of_the_published_head():
    head = init_grammar_head(jax.random.key(0), 5, 7)
    feature_BKD = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    hidden, output = (np.asarray(head[name], np.float64) for name in ("hidden", "output"))
    exponent = np.exp(np.maximum(feature_BKD @ hidden, 0) @ output)
    found = grammar_score(head, jnp.asarray(feature_BKD))
    np.testing.assert_allclose(found, exponent[..., 1] / exponent.sum(-1), atol=1e-6)
    assert grammar_logits(head, jnp.asarray(feature_BKD)).shape == (2, 3, 2)
    assert init_grammar_head(jax.random.key(0), 5)["hidden"].shape == (5, 5)


def letters(texts):
    """Of each text a feature that says which letter follows which."""
    found = np.zeros((len(texts), len(ORDER), len(ORDER)), np.float32)
    for row, text in zip(found, texts, strict=True):
        places = [ORDER.index(word) for word in text.split()]
        row[places[:-1], places[1:]] = 1
    return found.reshape(len(texts), -1)


def test_rising_letters_are_learnt():
    rng = np.random.default_rng(0)
    texts = [" ".join(sorted(rng.choice(list(ORDER), 5, replace=False))) for _ in range(300)]
    head, metrics = fit_grammar_head(letters, texts, SMALL)
    # Without a letter or two the others still rise: an operation in five cannot be seen.
    assert metrics["grammar_accuracy"] > 0.8
    assert metrics["grammar_whole"] > 0.7 > 0.35 > metrics["grammar_broken"]
    score = grammar_score(head, jnp.asarray(letters(["a c d g", "g d c a", "a c c d"])))
    assert score[0] > 0.7 and score[1] < 0.1 and score[2] < 0.4
    again, same = fit_grammar_head(letters, texts[::-1], SMALL)
    assert same == metrics
    jax.tree.map(np.testing.assert_array_equal, again, head)


def test_a_file_of_the_head(tmp_path):
    head, path = init_grammar_head(jax.random.key(0), 4), str(tmp_path / "head.npz")
    write_grammar_head(path, head)
    jax.tree.map(np.testing.assert_array_equal, read_grammar_head(path, 4), head)
    with pytest.raises(UserError, match="the towers' are 5 wide"):
        read_grammar_head(path, 5)
    with pytest.raises(UserError, match="cannot be read"):
        read_grammar_head(str(tmp_path / "none.npz"), 4)
    for content in (b"", b"no archive"):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            read_grammar_head(str(tmp_path / "other"), 4)


def test_the_feature_is_what_the_projection_embeds():
    model = LoadedModel(towers(), params(), tokenizer(), PREPROCESSING, {}, step=0)
    texts = ["a dark thing", "grey", "them of the bright"]
    feature_ND = model.text_features(texts)
    projection = model.embedder.module(model.params).decoder.class_projection
    embedded = unit_norm(apply_projection(projection, jnp.asarray(feature_ND)))
    np.testing.assert_allclose(embedded, model.embed_texts(texts), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 0}, "grammar.steps=0"),
        ({"copies": 0}, "grammar.copies=0"),
        ({"learning_rate": 0.0}, "grammar.learning_rate=0.0"),
        ({"held_out": 1.0}, "grammar.held_out=1.0"),
    ],
)
def test_wrong_settings_are_said(fields, said):
    with pytest.raises(UserError, match=said):
        GrammarTraining(**fields)


def test_one_caption_is_too_few():
    with pytest.raises(UserError, match="1 different captions to learn grammar from"):
        fit_grammar_head(letters, ["a b", " a b "], SMALL)
