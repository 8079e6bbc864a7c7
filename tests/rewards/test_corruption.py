"""Broken captions: what each operation leaves, and that none is left whole."""

import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from capjax.errors import UserError
from capjax.rewards import corruption
from capjax.rewards.corruption import corrupt

WORDS = [f"w{number}" for number in range(8)]
VOCABULARY = ["x", "y", "z"]


def bag(words):
    return collections.Counter(words)


def results(operation, count=200):
    return [operation(list(WORDS), VOCABULARY, np.random.default_rng(i)) for i in range(count)]


def is_part(words, whole):
    rest = iter(whole)
    return all(word in rest for word in words)


def test_each_operation():
    repeated = results(corruption.repeat)
    assert all(is_part(WORDS, found) for found in repeated)
    added = [bag(found) - bag(WORDS) for found in repeated]
    # One n-gram of one to three words, so many times.
    sizes = {(len(ngram), *set(ngram.values())) for ngram in added}
    assert sizes == {(size, times) for size in (1, 2, 3) for times in (1, 2, 3)}
    removed = [bag(WORDS) - bag(found) for found in results(corruption.remove)]
    assert {gone.total() for gone in removed} == {1, 2, 3}
    for gone in removed:
        places = sorted(WORDS.index(word) for word in gone)
        assert places == list(range(places[0], places[0] + len(places)))
    inserted = results(corruption.insert)
    assert {len(found) - 8 for found in inserted} == {1, 2, 3}
    assert all(is_part(WORDS, found) and set(found) <= {*WORDS, *VOCABULARY} for found in inserted)
    swapped = results(corruption.swap)
    changed = {sum(a != b for a, b in zip(found, WORDS, strict=True)) for found in swapped}
    assert changed == {1, 2, 3} and all(set(found) <= {*WORDS, *VOCABULARY} for found in swapped)
    shuffled = results(corruption.shuffle)
    assert all(bag(found) == bag(WORDS) for found in shuffled)
    assert len({tuple(found) for found in shuffled}) > 190


def test_all_operations_are_as_likely():
    text, seen = " ".join(WORDS), collections.Counter()
    for number in range(600):
        words = corrupt(text, VOCABULARY, (0, number)).split()
        new = set(words) & set(VOCABULARY)
        if new:
            seen["swap" if len(words) == 8 else "insert"] += 1
        else:
            seen[np.sign(len(words) - 8)] += 1
    assert all(80 < count < 160 for count in seen.values()) and len(seen) == 5


@hypothesis.given(
    strategies.lists(strategies.sampled_from("ab"), min_size=1, max_size=4),
    strategies.integers(0, 2**32),
)
def test_never_whole_never_empty_and_by_its_key(words, seed):
    text = " ".join(words)
    found = corrupt(text, ["a"], (seed, 3))
    assert found and found != text
    assert found == corrupt(text, ["a"], (seed, 3))


def test_nothing_to_break_is_said():
    with pytest.raises(UserError, match="expected a word at least"):
        corrupt(" ", VOCABULARY, (0,))
    with pytest.raises(UserError, match="vocabulary of 0 words"):
        corrupt("a", [], (0,))
