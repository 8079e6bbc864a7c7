"""Captions in a better order: by similarity, by confidence of content words, and the record."""

import numpy as np
import pytest

from capjax.data.tokenizer import Tokenizer
from capjax.decoding.rerank import (
    WordConfidence,
    content_confidence,
    rerank,
    similarity,
    word_confidences,
)
from capjax.errors import UserError

CAPTIONS = [
    {"caption": "a cat", "logprob": -3.0, "num_tokens": 3},
    {"caption": "a red cat", "logprob": -4.0, "num_tokens": 4},
    {"caption": "a dog", "logprob": -5.0, "num_tokens": 3},
]
RECORD = {"key": "7", **CAPTIONS[0], "seed": 0, "captions": CAPTIONS}


def test_a_record_takes_the_best_captions_fields():
    found = rerank(RECORD, [0.1, 0.5, 0.1])
    assert [c["caption"] for c in found["captions"]] == ["a red cat", "a cat", "a dog"]
    assert [c["score"] for c in found["captions"]] == [0.5, 0.1, 0.1]
    assert {k: v for k, v in found.items() if k != "captions"} == {
        "key": "7",
        "seed": 0,
        "score": 0.5,
        **CAPTIONS[1],
    }
    assert "score" not in RECORD["captions"][1]


@pytest.mark.parametrize("scores", [[0.1], [0.1, 0.2, float("nan")]])
def test_scores_that_do_not_fit(scores):
    with pytest.raises(UserError, match="for 3 captions"):
        rerank(RECORD, scores)
    with pytest.raises(UserError, match="num_captions"):
        rerank({"key": "7", **CAPTIONS[0]}, scores)


def test_similarity_is_of_each_image_with_its_own_captions():
    images = np.array([[1.0, 0.0], [0.6, 0.8]])
    texts = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.8, 0.6], [0.6, 0.8]]])
    np.testing.assert_allclose(similarity(images, texts), [[1, 0], [0.96, 1]])


def test_words_have_the_confidence_of_their_tokens():
    pieces = {3: "a ", 4: "tabby ", 5: "ca", 6: "t's", 7: " on it."}
    ids, probabilities = [3, 4, 5, 6, 7], [0.9, 0.8, 0.2, 0.6, 0.5]
    words = word_confidences(
        ids, np.log(probabilities), lambda ids: "".join(pieces[i] for i in ids)
    )
    expected = [("a", 0.9), ("tabby", 0.8), ("cat's", 0.4), ("on", 0.5), ("it", 0.5)]
    assert [w.word for w in words] == [word for word, _ in expected]
    np.testing.assert_allclose([w.confidence for w in words], [c for _, c in expected])
    assert content_confidence(words) == pytest.approx((0.8 + 0.4) / 2)
    assert content_confidence([WordConfidence("The", 0.9)]) == 0


@pytest.mark.parametrize("split_by_whitespace", [True, False])
def test_words_of_a_tokenizer(split_by_whitespace):
    texts = ["two dogs on the grass", "two dogs and a cat", "the grass and two dogs"] * 3
    tokenizer = Tokenizer.train(texts, 300, split_by_whitespace=split_by_whitespace)
    text = "two dogs and a café"  # which the bytes spell
    ids = tokenizer.encode(text, tokenizer.count(text))[:-1].tolist()
    words = word_confidences(ids, np.log(np.linspace(0.1, 0.9, len(ids))), tokenizer.decode)
    assert [w.word for w in words] == text.split()
    confidences = [w.confidence for w in words]
    assert confidences == sorted(confidences)
    assert confidences[0] >= 0.1 and confidences[-1] <= 0.9
