"""CIDEr-D against the reference code's figures, closed forms and a plain computation."""

import collections
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from capjax.rewards import consensus

REFERENCES = [
    ["a cat sits on a mat", "a cat is on the mat"],
    ["a dog runs in the park", "the dog is running"],
    ["a man rides a horse", "a man on a horse"],
]
CANDIDATES = ["a cat on a mat", "a dog runs in a park", "a woman rides a horse"]
CAPTION = strategies.lists(strategies.sampled_from("abcd"), max_size=7)
SETS = strategies.lists(
    strategies.tuples(CAPTION, strategies.lists(CAPTION, min_size=1, max_size=3)),
    min_size=1,
    max_size=5,
)


def tokens(captions, end=()):
    return [caption.split() + list(end) for caption in captions]


def grams(caption, order):
    return collections.Counter(
        tuple(caption[i : i + order]) for i in range(len(caption) - order + 1)
    )


def plainly(candidate, references, corpus, *, is_clipped):
    """One caption's CIDEr or CIDEr-D, as the paper writes it."""
    total = 0.0
    for reference in references:
        for order in range(1, 5):
            vectors = []
            for caption in (candidate, reference):
                held = {
                    gram: sum(any(gram in grams(c, order) for c in image) for image in corpus)
                    for gram in grams(caption, order)
                }
                vectors.append(
                    {
                        gram: count * math.log(len(corpus) / max(1, held[gram]))
                        for gram, count in grams(caption, order).items()
                    }
                )
            ours, theirs = vectors
            dot = sum(
                (min(ours[gram], theirs[gram]) if is_clipped else ours[gram]) * theirs[gram]
                for gram in ours.keys() & theirs.keys()
            )
            norms = math.prod(math.sqrt(sum(x * x for x in v.values())) for v in vectors)
            apart = max(len(candidate) - 1, 0) - max(len(reference) - 1, 0)
            penalty = math.exp(-(apart**2) / 72) if is_clipped else 1.0
            total += penalty * dot / norms if norms else 0.0
    return 10 * total / 4 / len(references)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ((), [3.57671179, 3.4131121, 2.72169355]),
        (("0",), [4.41926007, 3.26727877, 3.98100798]),
    ],
)
def test_the_tiny_corpus(end, expected):
    references = [tokens(image, end) for image in REFERENCES]
    found = consensus.cider_d(tokens(CANDIDATES, end), references)
    np.testing.assert_allclose(found, expected, atol=5e-9)


def test_every_image_of_the_public_set_as_the_reference_code(fakecap):
    items = fakecap["items"]
    found = consensus.cider_d(
        tokens(item["cand"] for item in items), [tokens(item["refs"]) for item in items]
    )
    np.testing.assert_allclose(found, [item["cider_d"] for item in items], atol=1e-12)
    assert found.mean() == pytest.approx(fakecap["corpus"]["cider_d"], abs=1e-12)
    assert f"{found.mean():.3f}" == "0.600"


def test_one_image_scores_nothing_and_three_perfect_words_three_quarters():
    assert consensus.cider_d([["a", "cat"]], [[["a", "cat"]]]) == [0.0]
    found = consensus.cider_d([["a", "red", "cat"], ["no"]], [[["a", "red", "cat"]], [["b"]]])
    np.testing.assert_allclose(found, [7.5, 0.0])


@hypothesis.given(SETS, SETS)
def test_as_computed_plainly_with_its_own_and_with_other_frequencies(items, others):
    candidates = [candidate for candidate, _ in items]
    references = [captions for _, captions in items]
    for corpus, frequencies in (
        (references, None),
        (
            [captions for _, captions in others],
            consensus.document_frequencies([captions for _, captions in others]),
        ),
    ):
        for measure, is_clipped in ((consensus.cider_d, True), (consensus.cider, False)):
            expected = [
                plainly(candidate, captions, corpus, is_clipped=is_clipped)
                for candidate, captions in items
            ]
            np.testing.assert_allclose(
                measure(candidates, references, frequencies), expected, atol=1e-12
            )


def test_several_candidates_of_an_image_as_each_alone():
    references = [tokens(image) for image in REFERENCES]
    frequencies = consensus.document_frequencies(references)
    assert frequencies.num_documents == 3
    rows = [2, 0, 0, 1, 2]
    sampled = tokens(["a horse", "a mat", "a cat on a mat", "the park", "a man rides"])
    found = consensus.cider_d(sampled, references, rows=rows)
    for caption, row, score in zip(sampled, rows, found, strict=True):
        alone = consensus.cider_d([caption], [references[row]], frequencies)
        np.testing.assert_allclose(alone, [score], atol=1e-12)
    assert not len(consensus.cider_d([], [], frequencies))


def test_ids_are_tokens_too():
    text = " ".join(caption for image in REFERENCES for caption in image)
    ids = {word: place for place, word in enumerate(text.split())}
    words = [tokens(image) for image in REFERENCES]
    numbers = [[[ids[word] for word in caption] for caption in image] for image in words]
    np.testing.assert_allclose(
        consensus.cider_d([image[1] for image in numbers], numbers),
        consensus.cider_d([image[1] for image in words], words),
        atol=1e-12,
    )


@pytest.mark.parametrize(
    ("candidates", "references", "said"),
    [
        ([], [], "no references"),
        ([["a"]], [[["a"]], [["b"]]], "1 candidates for the references of 2 images"),
        ([["a"], ["b"]], [[["a"]], []], "image 1 has no reference"),
        (["a b"], [[["a"]]], "text.split"),
    ],
)
def test_what_does_not_match_is_said(candidates, references, said):
    with pytest.raises(ValueError, match=said):
        consensus.cider_d(candidates, references)
