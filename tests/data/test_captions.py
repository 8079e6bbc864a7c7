"""Caption choice: probabilities, cuts and frames, and a fixed number of draws."""

from collections import Counter

import numpy as np
import pytest

from capjax.data.captions import (
    CaptionChoice,
    NoCaption,
    caption_texts,
    choose_captions,
    first_caption,
    reference_texts,
)
from capjax.data.records import Caption, Example
from capjax.errors import UserError

EXAMPLE = Example(
    "k",
    b"x",
    (
        Caption("A Red\n  Cat", "tts"),
        Caption("cat", "keyword"),
        Caption("pet", "keyword"),
        Caption("  ", "tts"),
    ),
)


def choices(choice: CaptionChoice, n: int = 4000) -> dict[str, float]:
    rng = np.random.default_rng(0)
    counts = Counter(choose_captions(EXAMPLE, choice, rng)[0] for _ in range(n))
    return {text: count / n for text, count in counts.items()}


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({}, {"a red cat": 1 / 3, "cat": 1 / 3, "pet": 1 / 3}),
        ({"tts": 1.0, "keyword": 0.0}, {"a red cat": 1.0}),
        ({"tts": 1.0}, {"a red cat": 1.0}),
        ({"tts": 1.0, "keyword": 3.0}, {"a red cat": 1 / 4, "cat": 3 / 8, "pet": 3 / 8}),
        ({"keyword": 0.5, "other": 9.0}, {"cat": 1 / 2, "pet": 1 / 2}),
    ],
)
def test_captions_are_chosen_with_the_weights_of_their_sources(sources, expected):
    shares = choices(CaptionChoice(sources))
    assert shares.keys() == expected.keys()
    for text, share in expected.items():
        assert abs(shares[text] - share) < 0.03


@pytest.mark.parametrize("sources", [{}, {"keyword": 1.0}, {"tts": 1.0, "keyword": 9.0}])
def test_no_caption_comes_twice_before_all_have_come(sources):
    known = sorted(caption_texts(EXAMPLE, CaptionChoice(sources)))
    choice = CaptionChoice(sources, per_image=2 * len(known) + 1)
    for seed in range(20):
        texts = choose_captions(EXAMPLE, choice, np.random.default_rng(seed))
        assert len(texts) == choice.per_image
        assert sorted(texts[: len(known)]) == known
        assert sorted(texts[len(known) : -1]) == known


def test_the_number_of_captions_changes_neither_the_first_nor_any_later_draw():
    one, many = np.random.default_rng(3), np.random.default_rng(3)
    first = choose_captions(EXAMPLE, CaptionChoice(), one)
    assert choose_captions(EXAMPLE, CaptionChoice(per_image=3), many)[:1] == first
    assert one.random() == many.random()


def test_at_least_one_caption_is_drawn():
    with pytest.raises(UserError, match=r"captions\.per_image=0: expected at least 1"):
        CaptionChoice(per_image=0)


def test_case_is_kept_on_request_and_white_space_is_not():
    rng = np.random.default_rng(0)
    assert choose_captions(EXAMPLE, CaptionChoice({"tts": 1.0}, lower=False), rng) == ["A Red Cat"]


def test_the_reference_is_the_first_caption_of_the_heaviest_source():
    assert first_caption(EXAMPLE, CaptionChoice()) == "a red cat"
    assert first_caption(EXAMPLE, CaptionChoice({"tts": 0.4, "keyword": 0.6})) == "cat"
    for texts in (caption_texts, reference_texts):
        assert texts(EXAMPLE, CaptionChoice({"keyword": 1.0})) == ["cat", "pet"]


LONG = Example("k", b"x", (Caption("A cat. It sits! Is it 3.5 kg?", "alt"),))


def drawn(example: Example, dataset: str = "", **fields) -> Counter[str]:
    """How often each text comes, of 3000."""
    choice = CaptionChoice(**fields)
    rngs = (np.random.default_rng(seed) for seed in range(3000))
    return Counter(text for rng in rngs for text in choose_captions(example, choice, rng, dataset))


def test_sentences_of_a_long_caption():
    one = drawn(LONG, sentences="one")
    assert set(one) == {"a cat.", "it sits!", "is it 3.5 kg?"}
    assert min(one.values()) > 900
    run = drawn(LONG, sentences="run")
    pairs, whole = {"a cat. it sits!", "it sits! is it 3.5 kg?"}, "a cat. it sits! is it 3.5 kg?"
    assert set(run) == set(one) | pairs | {whole}
    assert abs(run[whole] - 1000) < 150  # each length alike, and each place of a length
    assert all(abs(run[pair] - 500) < 120 for pair in pairs)
    assert drawn(EXAMPLE, sentences="run").keys() == drawn(EXAMPLE).keys()


def test_templates_frame_a_caption():
    framed = drawn(LONG, "web", templates=("<{dataset}> {caption}", "{source}: {caption}"))
    text = "a cat. it sits! is it 3.5 kg?"
    assert set(framed) == {f"<web> {text}", f"alt: {text}"}
    assert min(framed.values()) > 1300
    braces = Example("k", b"x", (Caption("a {b} {0}"),))
    assert set(drawn(braces, templates=("x {caption}",))) == {"x a {b} {0}"}
    choice = CaptionChoice(templates=("{source}: {caption}",))
    assert first_caption(LONG, choice) == text
    assert caption_texts(LONG, choice) == [f"alt: {text}"]
    assert reference_texts(LONG, choice) == [text]
    named = CaptionChoice(templates=("<{dataset}> {caption}",))
    assert caption_texts(LONG, named, "web") == [f"<web> {text}"]


def test_a_token_tells_how_well_a_caption_fits():
    fields = {"templates": ("<{bin}> {caption}",), "score": "fit", "score_edges": (0.2, 0.3)}
    for fit, name in ((-1, 0), (0.19, 0), (0.2, 1), ("0.25", 1), (0.3, 2), (9, 2)):
        example = Example("k", b"x", (Caption("a"),), metadata={"fit": fit})
        assert set(drawn(example, **fields)) == {f"<{name}> a"}
        assert caption_texts(example, CaptionChoice(**fields)) == [f"<{name}> a"]
    published = (0.0280284, 0.0929691, 0.1579097, 0.2228504, 0.2877911, 0.3527318, 0.4176725)
    for fit, name in (
        (-0.1, 0),
        (0, 0),
        (0.1, 2),
        (0.2, 3),
        (0.25, 4),
        (0.3, 5),
        (0.4, 6),
        (0.9, 7),
    ):
        example = Example("k", b"x", (Caption("a"),), metadata={"fit": fit})
        assert set(drawn(example, **fields | {"score_edges": published})) == {f"<{name}> a"}
    for metadata in ({}, {"fit": None}, {"fit": "much"}, {"fit": float("nan")}):
        example = Example("k", b"x", (Caption("a"),), metadata=metadata)
        with pytest.raises(NoCaption, match="metadata\\['fit'\\]"):
            choose_captions(example, CaptionChoice(**fields), np.random.default_rng(0))
    for wrong in ({"score": "fit"}, {"score_edges": (1.0,)}, {"templates": ("{bin} {caption}",)}):
        with pytest.raises(UserError, match=r"captions\.score"):
            CaptionChoice(**wrong)
    with pytest.raises(UserError, match="rising numbers"):
        CaptionChoice(score="fit", score_edges=(0.3, 0.2))


def test_what_is_drawn_within_a_caption_changes_no_other_draw():
    for seed in range(50):
        plain, cut = np.random.default_rng(seed), np.random.default_rng(seed)
        kept = choose_captions(EXAMPLE, CaptionChoice(per_image=2), plain)
        fields = {"sentences": "run", "templates": ("{caption}", " {caption}")}
        assert choose_captions(EXAMPLE, CaptionChoice(per_image=2, **fields), cut) == kept
        assert plain.random() == cut.random()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("sentences", "some", "choose one of 'all'"),
        ("templates", ("a photo",), "with {caption} in it"),
        ("templates", ("{caption} of {who}",), "nothing else in braces"),
        ("templates", ("{caption",), "with {caption} in it"),
        ("templates", ("{caption.__class__}",), "with {caption} in it"),
        ("templates", ("{caption:>9}",), "with {caption} in it"),
        ("max_tokens", 1, "expected 0, or 2 and more"),
        ("max_tokens", -2, "expected 0, or 2 and more"),
    ],
)
def test_impossible_cuts_and_frames_are_refused(field, value, words):
    with pytest.raises(UserError, match=rf"captions\.{field}.*{words}"):
        CaptionChoice(**{field: value})


def test_an_example_without_a_wanted_caption_is_named():
    choice = CaptionChoice({"alt": 1.0})
    with pytest.raises(NoCaption, match=r"k: sources \['keyword', 'tts'\], wanted \['alt'\]"):
        first_caption(EXAMPLE, choice)
    assert caption_texts(EXAMPLE, choice) == reference_texts(EXAMPLE, choice) == []
    with pytest.raises(NoCaption):
        choose_captions(Example("k", b"x"), CaptionChoice(), np.random.default_rng(0))


def test_a_dataset_has_a_choice_of_its_own():
    own = CaptionChoice({"tts": 1.0}, lower=False, templates=("{dataset}: {caption}",))
    choice = CaptionChoice({"keyword": 1.0}, datasets={"web": own})
    assert (choice.of("web"), choice.of("coco"), choice.of("")) == (own, choice, choice)
    fields = {"sources": choice.sources, "datasets": choice.datasets}
    assert drawn(EXAMPLE, "web", **fields) == {"web: A Red Cat": 3000}
    assert set(drawn(EXAMPLE, "coco", **fields)) == {"cat", "pet"}
    assert caption_texts(EXAMPLE, choice, "web") == ["web: A Red Cat"]
    assert first_caption(EXAMPLE, choice) == "cat"  # evaluation knows of no dataset
    with pytest.raises(UserError, match=r"datasets\.web\.per_image=1: .*set captions\.per_image=1"):
        CaptionChoice(per_image=2, datasets={"web": own})


@pytest.mark.parametrize("sources", [{"a": -1.0}, {"a": 0.0}, {"a": float("nan")}])
def test_impossible_weights_are_refused(sources):
    with pytest.raises(UserError, match=r"captions\.sources"):
        CaptionChoice(sources)
