"""The built test of composition: swaps of captions, and the items of the embedded corpus."""

import collections

import pytest

from capjax.data.records import Caption, Example
from capjax.data.sources import open_source
from capjax.data.swaps import KINDS, PROFESSIONS, SPLITS, TONES, swap_items, swap_pairs, swapped


def example(caption, image=None, style="noto", group="People & Body"):
    captions = (Caption(caption, "tts"), Caption("a keyword", "keyword"))
    metadata = {"style": style, "group": group}
    return Example(f"{style}/{caption}", (image or caption).encode(), captions, metadata=metadata)


@pytest.mark.parametrize(
    ("kind", "caption", "want"),
    [
        ("gender", "woman cook: dark skin tone", ["man cook: dark skin tone"]),
        ("gender", "men holding hands", ["women holding hands"]),
        ("gender", "old woman", ["old man"]),
        ("gender", "kiss: woman, man", []),  # two people: the swapped caption would be as true
        ("gender", "woman’s hat", []),
        ("gender", "person with veil", []),
        ("order", "a: dark skin tone, light skin tone", ["a: light skin tone, dark skin tone"]),
        ("order", "kiss: man, man, dark skin tone, dark skin tone", []),
        ("order", "thumbs up: dark skin tone", []),
        ("profession", "artist palette", []),
        ("profession", "person cooking", []),
        ("tone", "thumbs up", []),
    ],
)
def test_one_swap(kind, caption, want):
    assert swapped(caption, kind) == want


def test_swaps_with_a_choice():
    found = swapped("man: medium-light skin tone, bald", "tone")
    assert found == [f"man: {tone}, bald" for tone in TONES if tone != "medium-light skin tone"]
    found = swapped("handshake: dark skin tone, light skin tone", "tone")
    others = {"medium-light skin tone", "medium skin tone", "medium-dark skin tone"}
    assert set(found) == {f"handshake: {tone}, light skin tone" for tone in others}
    found = swapped("woman police officer: light skin tone", "profession")
    assert len(found) == len(PROFESSIONS) - 1
    assert "woman cook: light skin tone" in found


def test_items_and_pairs():
    examples = [
        example("woman cook: dark skin tone"),
        example("man cook: dark skin tone"),
        example("man cook: dark skin tone", "other", style="fluent"),
        example("snowboarder: dark skin tone", "same"),
        example("snowboarder: light skin tone", "same"),
        example("flag: Isle of man", group="Flags"),
    ]
    items = swap_items(examples)
    kinds = collections.Counter(item.kind for item in items)
    assert kinds == {"tone": 3, "gender": 3, "profession": 3}
    assert all(item.truth == ((True, False),) for item in items)
    by_key = {item.key: item for item in items}
    found = by_key["noto/man cook: dark skin tone gender"]
    assert found.captions == ("man cook: dark skin tone", "woman cook: dark skin tone")
    assert found.images[0].parts == (b"man cook: dark skin tone",)
    [pair] = swap_pairs(examples)
    assert pair.kind == "gender" and len(pair.images) == 2
    assert [picture.parts[0].decode() for picture in pair.images] == list(pair.captions)


def test_the_embedded_corpus():
    sizes = {}
    for split in SPLITS[:2]:
        source = open_source(f"emoji:{split}")
        examples = [source[index] for index in range(len(source))]
        items = swap_items(examples)
        assert items == swap_items(examples)
        names = {e.key: e.captions[0].text for e in examples}
        for item in items:
            true, other = item.captions
            assert names[item.key.rpartition(" ")[0]] == true != other
            # Only the words that the kind names have changed.
            gone = set(true.replace(",", "").split()) ^ set(other.replace(",", "").split())
            assert (item.kind == "order") == (not gone)
        sizes[split] = collections.Counter(item.kind for item in items)
        keys = [item.key for item in items]
        assert len(set(keys)) == len(keys)
    assert set(sizes["composition"]) == set(KINDS)
    assert sizes["composition"].total() == 600 and sizes["val"].total() == 229
