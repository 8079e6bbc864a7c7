"""CIDEr-D as a reward of the host: the tiny corpus with ends, captions cut short, other rows."""

import pickle

import numpy as np
import pytest

from capjax.rewards import consensus
from capjax.rewards.consensus_reward import ConsensusReward, words

REFERENCES = [
    ["A cat sits on a mat.", "a cat is on the mat"],
    ["a dog runs in the park", "The dog is running!"],
    ["a man rides a horse", "a man, on a horse"],
]
REWARD = ConsensusReward.train(REFERENCES)


def test_the_tiny_corpus_with_ends():
    texts = [["a cat on a mat"], ["a dog runs in a park"], ["a woman rides a horse"]]
    found = REWARD(texts, REFERENCES)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0], [4.41926007, 3.26727877, 3.98100798], rtol=1e-6)


def test_a_caption_that_breaks_off_is_worth_less():
    texts = [["a cat on a mat", "a cat on a mat", "a cat on a"]]
    found = REWARD(texts, REFERENCES[:1], np.array([[True, False, True]]))
    np.testing.assert_allclose(found, [[4.41926, 3.2967, 2.1312]], atol=5e-5)


def test_several_captions_and_rows_that_fill_the_batch():
    texts = [["a horse", "the park"], ["", "x"], ["a mat", ""]]
    references = [REFERENCES[2], [], REFERENCES[0]]
    found = pickle.loads(pickle.dumps(REWARD))(texts, references)
    np.testing.assert_array_equal(found[1], 0)
    for row in (0, 2):
        for column, text in enumerate(texts[row]):
            expected = consensus.cider_d(
                [[*words(text), ""]],
                [[[*words(reference), ""] for reference in references[row]]],
                REWARD.frequencies,
            )
            np.testing.assert_allclose(found[row, column], expected[0], rtol=1e-6)
    assert found[0, 0] > found[0, 1] == 0  # the end alone, which every caption has
    assert REWARD([], []).shape == (0, 0)
    assert not REWARD([["a"]], [[]]).any()


def test_another_tokenization():
    letters = ConsensusReward.train([["ab", "b"], ["cd"]], list)
    np.testing.assert_allclose(letters([["abc"], ["cd"]], [["abc"], ["cd"]]), [[10], [7.5]])


def test_what_does_not_match_is_said():
    with pytest.raises(ValueError, match=r"captions of 1 images .* references of 2"):
        REWARD([["a"]], REFERENCES[:2])
    with pytest.raises(ValueError, match="as many captions of each"):
        REWARD([["a"], ["b", "c"]], REFERENCES[:2])
