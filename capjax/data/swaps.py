"""A test of composition on the embedded corpus: true captions, and ones with one part swapped.

The corpus names what it shows in few words of a fixed form ("woman cook: dark skin tone"), so a
swapped caption is grammatical and wrong of the picture. Nothing is drawn: the same records give the
same items.
"""

import re
import zlib
from collections.abc import Iterable

from capjax.data.compositional import DIAGONAL, Item, Picture
from capjax.data.records import Example

KINDS = ("tone", "gender", "profession", "order")
SPLITS = ("composition", "val", "style")  # of the corpus, that no model is trained on

TONES = tuple(f"{name} skin tone" for name in ("light", "medium-light", "medium", "medium-dark"))
TONES += ("dark skin tone",)
# The "person-role" emoji of Unicode that have a trade, in the words of CLDR.
PROFESSIONS = (
    *("artist", "astronaut", "construction worker", "cook", "detective", "factory worker"),
    *("farmer", "firefighter", "guard", "health worker", "judge", "mechanic", "office worker"),
    *("pilot", "police officer", "scientist", "singer", "student", "teacher", "technologist"),
)
_GENDERS = {"woman": "man", "women": "men", "girl": "boy"}
_GENDERS |= {male: female for female, male in _GENDERS.items()}

_TONE = re.compile(r"\b(?:medium-|)(?:light|medium|dark) skin tone")
_GENDER = re.compile(rf"\b(?:{'|'.join(_GENDERS)})\b(?!['’-])")
_PROFESSION = re.compile(rf"\b(?:{'|'.join(PROFESSIONS)})(?=:|$)")


def swapped(caption: str, kind: str) -> list[str]:
    """The captions that one swap makes of this one; none where there is nothing to swap.

    tone: a skin tone becomes one that the caption lacks. gender: "woman" becomes "man" and so on,
    where one person is named. profession: a trade becomes another one. order: two people's tones
    change places.
    """
    if kind == "tone" and (found := _TONE.search(caption)):
        return [_replaced(caption, found, tone) for tone in TONES if tone not in _tones(caption)]
    if kind == "gender":
        genders = list(_GENDER.finditer(caption))
        return [_replaced(caption, x, _GENDERS[x[0]]) for x in genders if len(genders) == 1]
    if kind == "profession" and (found := _PROFESSION.search(caption)):
        return [_replaced(caption, found, name) for name in PROFESSIONS if name != found[0]]
    if kind == "order" and len(tones := _tones(caption)) == 2 and tones[0] != tones[1]:
        return [_TONE.sub(lambda found: tones[found[0] == tones[0]], caption)]
    return []


def swap_items(examples: Iterable[Example]) -> list[Item]:
    """For every kind of swap that a picture's short name allows, the picture with both captions.

    Keys are "KEY KIND". Of several swaps of a kind, a hash of the key takes one.
    """
    return [
        Item(
            f"{example.key} {kind}",
            kind,
            (Picture((example.image,)),),
            (caption, choices[0]),
            ((True, False),),
        )
        for example, caption in _named(examples)
        for kind in KINDS
        if (choices := _in_hashed_order(example.key, swapped(caption, kind)))
    ]


def swap_pairs(examples: Iterable[Example]) -> list[Item]:
    """Pairs of pictures of one style whose short names are each other's swap: as in Winoground.

    What favours a caption, whatever the picture, cancels where two pictures are compared by it. A
    picture stands in one pair of a kind; keys are "KEY KEY KIND".
    """
    named = list(_named(examples))
    items = []
    for kind in KINDS:
        waiting = {(example.metadata["style"], caption): example for example, caption in named}
        for example, caption in named:
            style = example.metadata["style"]
            if waiting.pop((style, caption), None) is None:
                continue
            choices = _in_hashed_order(example.key, swapped(caption, kind))
            other = next((text for text in choices if (style, text) in waiting), None)
            if other is not None:
                partner = waiting.pop((style, other))
                key = f"{example.key} {partner.key} {kind}"
                pictures = (Picture((example.image,)), Picture((partner.image,)))
                items.append(Item(key, kind, pictures, (caption, other), DIAGONAL))
    return items


def _named(examples: Iterable[Example]) -> list[tuple[Example, str]]:
    """The examples that are no flags, with their short names.

    Pictures that several captions share are left out: which is true of them cannot be seen.
    """
    found: dict[bytes, list[Example]] = {}
    for example in examples:
        found.setdefault(example.image, []).append(example)
    return [
        (shown[0], caption.text)
        for shown in found.values()
        for caption in shown[0].captions
        if caption.source == "tts" and len(shown) == 1 and shown[0].metadata["group"] != "Flags"
    ]


def _in_hashed_order(key: str, choices: list[str]) -> list[str]:
    """The choices, turned by a hash of the key."""
    first = zlib.crc32(key.encode()) % max(len(choices), 1)
    return choices[first:] + choices[:first]


def _tones(caption: str) -> list[str]:
    return _TONE.findall(caption)


def _replaced(caption: str, found: re.Match, new: str) -> str:
    return caption[: found.start()] + new + caption[found.end() :]
