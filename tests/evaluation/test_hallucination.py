"""Hallucination: CHAIR's vectors and rules, lexicons of one's own, the embedded corpus."""

from pathlib import Path

import numpy as np
import pytest

import capjax.data
from capjax.data.sources import open_source
from capjax.errors import UserError
from capjax.evaluation.hallucination import measure_hallucination
from capjax.evaluation.lexicon import coco_lexicon, mentions, read_lexicon, with_words_of

SYNONYMS = """\
person, girl, boy, man, woman, kid, baby, people, adult, passenger
car, automobile, van
motorcycle, scooter, motor bike, motor cycle, motorbike
airplane, plane, air plane, jet
train, railway
traffic light, street light, traffic signal, streetlight
bird, duck, gull
cat, kitten
dog, puppy
bear, panda
teddy bear, teddybear
hot dog
wine glass
knife
tie, bow
chair, seat, stool
toilet, urinal
dining table, table
bus, minibus
"""
EMOJI = Path(capjax.data.__file__).parent / "emoji" / "lexicon.txt"


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    path = tmp_path_factory.mktemp("lexicon") / "synonyms.txt"
    path.write_text(SYNONYMS)
    return coco_lexicon(path)


def test_vector(coco):
    found = measure_hallucination(
        ["A dog and a cat.", "a car"], [["the dog"], ["a car"]], coco, keys=("1", "2")
    )
    np.testing.assert_allclose(found.metrics["chair_i"], 1 / 3)
    assert found.metrics["chair_s"] == 0.5
    np.testing.assert_allclose(found.metrics["mention_precision"], 2 / 3)
    assert found.metrics["mention_recall"] == 1
    assert found.intervals.keys() == found.metrics.keys()
    assert found.intervals["chair_i"] == (0, 0.5)  # of the second caption twice, of the first
    assert found.items["num_mentions"].tolist() == [2, 1]
    assert found.items["num_hallucinated"].tolist() == [1, 0]
    # What the annotations name is there too, and each mention counts.
    found = measure_hallucination(
        ["two cats and a cat by a dining table"],
        [["a kitten"]],
        coco,
        keys="1",
        objects=[["dining table", "bus"]],
    ).metrics
    assert found["chair_i"] == 0 and np.isclose(found["mention_recall"], 2 / 3)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man on a motor bike", ["person", "motorcycle"]),
        ("hot dogs and wine glasses", ["hot dog", "wine glass"]),
        ("a Teddy Bear, a bear", ["teddy bear", "bear"]),
        ("baby birds with an adult cat", ["bird", "cat"]),
        ("a baby", ["person"]),
        ("a passenger jet and a passenger train", ["airplane", "train"]),
        ("the man's bow tie", ["person", "tie"]),
        ("a toilet seat", ["toilet"]),
        ("the seat of a toilet", ["toilet"]),
        ("a seat", ["chair"]),
        ("traffic lights, street lights", ["traffic light", "traffic light"]),
        ("knives, buses, people, women, a puppy", ["knife", "bus", "person", "person", "dog"]),
        ("home plate, glass", []),
        ("", []),
    ],
)
def test_the_rules_of_coco(coco, caption, expected):
    assert mentions(caption, coco) == expected


def test_nothing_to_count(coco):
    found = measure_hallucination(["a b", "c"], [["d"], []], coco, keys="12")
    assert found.metrics == {"chair_s": 0}
    assert found.skipped.keys() == {"chair_i", "mention_precision", "mention_recall"}
    with pytest.raises(ValueError, match="shorter"):
        measure_hallucination(["a", "b"], [[]], coco, keys="12")


def test_a_lexicon_of_ones_own(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text(
        "# things\nball, sphere\n[colour]\nred\nsky blue, azure # two words\nblue\n[size]\nbig\n"
    )
    lexicon = read_lexicon(path)
    assert lexicon.kinds["ball"] == "object" and lexicon.kinds["sky blue"] == "colour"
    assert mentions("Two AZURE balls, sky blue", lexicon) == ["sky blue", "ball", "sky blue"]
    found = measure_hallucination(
        ["a big red ball", "a blue sphere"],
        [["a red ball"], ["an azure ball"]],
        lexicon,
        keys="12",
    ).metrics
    assert found["object_precision"] == found["object_recall"] == 1
    assert found["colour_precision"] == found["colour_recall"] == 0.5
    assert found["size_precision"] == 0 and "size_recall" not in found
    assert np.isclose(found["chair_i"], 2 / 5) and found["chair_s"] == 1
    more = with_words_of(lexicon, ["a dog and dogs in 2 glasses"])
    assert mentions("three dogs, the dog, a ball, a glass", more) == ["dog", "dog", "ball"]
    with pytest.raises(UserError, match="expected a line for each thing"):
        read_lexicon(_written(tmp_path, "# nothing\n"))
    with pytest.raises(UserError, match="expected a lexicon"):
        read_lexicon(tmp_path / "none.txt")


def _written(tmp_path, text):
    path = tmp_path / "other.txt"
    path.write_text(text)
    return path


def test_the_embedded_corpus():
    source = open_source("emoji:composition")
    texts = [source[i].captions[0].text for i in range(0, len(source), 7)]
    caption, reference = "man teacher: dark skin tone", "woman teacher: medium-dark skin tone"
    texts.append(reference)
    lexicon = with_words_of(read_lexicon(EMOJI), texts)
    faithful = measure_hallucination(texts, [[text] for text in texts], lexicon, keys=texts)
    assert faithful.metrics["chair_i"] == faithful.metrics["chair_s"] == 0
    for kind in ("mention", "tone", "gender", "word"):
        assert faithful.metrics[f"{kind}_recall"] == 1
    found = measure_hallucination([caption], [[reference]], lexicon, keys="1").metrics
    assert found["tone_precision"] == found["gender_recall"] == 0
    assert found["word_precision"] == found["word_recall"] == 1


def test_a_vague_caption_of_the_embedded_corpus_is_not_wrong():
    """By hand: of two tones one is said, of two genders none; of two manners said one is there."""
    captions = ["person with veil: dark skin tone", "pilot: light skin tone, facing right"]
    references = [["woman with veil: dark skin tone"], ["man pilot: medium skin tone"]]
    found = measure_hallucination(captions, references, read_lexicon(EMOJI), keys="12")
    expected = {"tone_recall": 1 / 2, "tone_precision": 1 / 2, "gender_recall": 0}
    expected |= {"manner_recall": 1, "manner_precision": 1 / 2}
    expected |= {"mention_recall": 2 / 5, "mention_precision": 2 / 4, "chair_s": 1 / 2}
    assert found.metrics == pytest.approx(expected | {"chair_i": 2 / 4})
    assert found.skipped == {"gender_precision": "no caption mentions anything of the lexicon"}
