"""Caption metrics against values worked out by hand."""

import numpy as np
import pytest

from capjax.evaluation import captions


def test_exact_match_ignores_case_only():
    predictions = ["Grinning Face", "grinning face ", "grinning, face", "grinning face"]
    items = captions.exact_match_items(predictions, ["grinning face"] * 4)
    np.testing.assert_array_equal(items, [True, False, False, True])
    assert captions.exact_match(predictions, ["grinning face"] * 4) == 0.5


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("a red cat", "A red CAT!", 1.0),
        ("a red cat", "a blue cat", 2 / 3),
        ("red", "red red red", 2 * 1 * (1 / 3) / (1 + 1 / 3)),  # precision 1, recall 1/3
        ("red red red", "red", 0.5),  # a multiset: repeating does not help
        ("medium-dark skin tone", "medium-light skin tone", 0.75),  # the hyphen splits
        ("café", "cafe", 0.0),
        ("", "red", 0.0),
        ("red", "", 0.0),
        ("", "!", 1.0),
    ],
)
def test_f1_closed_forms(prediction, reference, expected):
    assert captions.f1(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_f1_is_symmetric_and_means_over_items():
    pairs = [("a b c", "a b"), ("x", "y"), ("b a", "a b")]
    predictions, references = (list(side) for side in zip(*pairs, strict=True))
    forward = captions.unigram_f1_items(predictions, references)
    np.testing.assert_allclose(forward, [0.8, 0.0, 1.0])
    np.testing.assert_array_equal(forward, captions.unigram_f1_items(references, predictions))
    assert captions.unigram_f1(predictions, references) == pytest.approx(0.6)


def test_best_of_several_references():
    references = [["a cat", "two dogs"], ("sun",)]
    assert captions.exact_match(["Two dogs", "moon"], references) == 0.5
    np.testing.assert_allclose(captions.unigram_f1_items(["two cats", "sun"], references), [0.5, 1])


def test_caption_metrics():
    metrics = captions.caption_metrics(["a cat", "A cat", "one two three", ""], ["a cat"] * 4)
    assert metrics == {
        "exact_match": 0.5,
        "unigram_f1": 0.5,
        "distinct_ratio": 0.75,
        "num_words": 1.75,
    }


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no captions"),
        (["a"], [], "1 predictions for 0"),
        (["a", "b"], ["a", []], "item 1 has no reference"),
        ("ab", ["a", "b"], "one string"),
        (["a", "b"], "ab", "one string"),
    ],
)
def test_bad_lists_are_refused(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        captions.caption_metrics(predictions, references)
