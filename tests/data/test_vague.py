"""Vague captions: what is left out, how often, and that what stays is one of the corpus' forms."""

import pickle

import numpy as np
import pytest

from capjax.data.sources import EMOJI_DIRECTORY, open_source
from capjax.data.vague import attributes, make_vague
from capjax.errors import UserError
from capjax.evaluation.lexicon import mentions, read_lexicon


@pytest.fixture(scope="module")
def examples():
    source = open_source("emoji:train?vague=0.7")
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize(
    ("dropped", "caption", "expected"),
    [
        ("tone", "woman pilot: dark skin tone", "woman pilot"),
        ("gender", "woman pilot: dark skin tone", "pilot: dark skin tone"),
        ("gender", "man mountain biking", "person mountain biking"),
        ("gender", "woman in tuxedo", "person in tuxedo"),
        ("gender", "deaf man", "deaf person"),
        ("gender", "old woman: light skin tone", "older person: light skin tone"),
        ("gender", "women holding hands", "people holding hands"),
        ("gender", "woman and man holding hands", "people holding hands"),
        ("gender", "merman", "merperson"),
        ("gender", "girl: light skin tone", "child: light skin tone"),
        ("gender", "woman’s hat", "hat"),
        ("gender", "family: man, woman, girl", "family: adult, adult, child"),
        ("gender", "kiss: man, man, dark skin tone", "kiss: dark skin tone"),
        (
            "gender",
            "kiss: woman, man, light skin tone, dark skin tone",
            "kiss: person, person, light skin tone, dark skin tone",
        ),
        ("tone", "kiss: woman, man, light skin tone, dark skin tone", "kiss: woman, man"),
        ("tone", "kiss: person, person, light skin tone, dark skin tone", "kiss"),
        (
            "facing right",
            "man running: dark skin tone, facing right",
            "man running: dark skin tone",
        ),
        ("white hair", "woman: dark skin tone, white hair", "woman: dark skin tone"),
        ("with veil", "man with veil: dark skin tone", "man: dark skin tone"),
        ("with white cane", "man with white cane: facing right", "man: facing right"),
        ("leftwards", "leftwards hand", "hand"),
        ("tone gender wearing turban", "man wearing turban: dark skin tone", "person"),
        ("gender", "flag: Isle of Man", "flag: Isle of Man"),
        ("gender", "snowman", "snowman"),
    ],
)
def test_what_is_left_without_an_attribute(dropped, caption, expected):
    assert make_vague(caption, lambda unit: unit in dropped) == expected


def test_what_is_kept_is_said_and_what_is_dropped_is_not(examples):
    """For every caption of the corpus: without any kind, the others stay as they are."""
    units = {"tone": ["tone"], "gender": ["gender"]}
    for caption in {example.captions[0].text for example in examples}:
        found = attributes(caption)
        assert make_vague(caption, lambda unit: False) == caption
        for kind in found:
            dropped = units.get(kind, found[kind])
            vague = make_vague(caption, lambda unit, dropped=dropped: unit in dropped)
            assert attributes(vague) == found | {kind: []}, caption


def test_attributes_are_what_the_lexicon_of_the_corpus_counts(examples):
    lexicon = read_lexicon(EMOJI_DIRECTORY / "lexicon.txt")
    assert {*lexicon.kinds.values()} == {"tone", "gender", "manner"}
    for example in examples:
        if example.metadata["group"] in ("Flags", "Component"):
            continue
        found = example.metadata["attributes"]
        said = mentions(example.captions[0].text, lexicon)
        for kind, names in found.items():
            counted = [name for name in said if lexicon.kinds[name] == kind]
            assert sorted(counted) == sorted(names), example.captions[0].text


def test_seven_attributes_in_ten_are_left_out_independently(examples):
    kept = {"tone": [], "gender": []}
    for example in examples:
        full, vague = (attributes(example.captions[i].text) for i in (0, -1))
        assert example.captions[-1].source == "vague"
        if full["tone"] and full["gender"]:
            for kind, found in kept.items():
                found.append(bool(vague[kind]))
    tone_N, gender_N = map(np.array, kept.values())
    assert len(tone_N) > 1000
    assert abs(tone_N.mean() - 0.3) < 0.04 and abs(gender_N.mean() - 0.3) < 0.04
    assert abs(np.corrcoef(tone_N, gender_N)[0, 1]) < 0.08


def test_the_share_of_attributes_that_is_said(examples):
    shares = {example.captions[0].text: set() for example in examples}
    for example in examples:
        share = example.metadata["said"]
        assert (share == 1) == (example.captions[0].text == example.captions[-1].text)
        shares[example.captions[0].text].add(share)
    assert set().union(*shares.values()) >= {0, 1 / 3, 1 / 2, 1}
    assert shares["woman pilot: light skin tone"] <= {0, 0.5, 1} and shares["ant"] == {1}


def test_an_address_adds_a_caption_and_changes_nothing_else(examples):
    plain = open_source("emoji:val")
    for fraction, expected in ((0, lambda text: text), (1, lambda text: make_vague(text, bool))):
        source = open_source(f"emoji:val?vague={fraction}")
        assert len(source) == len(plain) and "WithVague" in repr(source)
        for i in (0, 7, 100):
            example, without = source[i], plain[i]
            assert example.captions[:-1] == without.captions
            assert example.captions[-1].text == expected(without.captions[0].text)
            assert example._replace(captions=(), metadata={}) == without._replace(
                captions=(), metadata={}
            )
    again = pickle.loads(pickle.dumps(open_source("emoji:train?vague=0.7")))
    assert [again[i] for i in range(5)] == examples[:5]
    noto = open_source("emoji:train?vague=0.7", styles=("noto",), flags=False)
    assert noto[0] in examples and noto[0].metadata["style"] == "noto"
    with pytest.raises(IndexError, match="WithVague"):
        again[len(again)]


@pytest.mark.parametrize("query", ["vague=2", "vague=often", "vague", "tone=0.5", "vague=0.7&x=1"])
def test_other_options_are_refused(query):
    with pytest.raises(UserError, match=r"emoji:train\?vague=0.7"):
        open_source(f"emoji:train?{query}")
