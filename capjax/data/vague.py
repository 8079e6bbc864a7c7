"""The embedded corpus with captions as vague as people's: attributes are left out at random.

An attribute is what a short name says beyond what is shown: the skin tones ("tone"), the genders
("gender"), and each "manner": hair, beard, the direction, what is worn or carried. Without any of
them a caption is still one of the corpus' form: "woman with veil: dark skin tone" is then "woman
with veil", "person: dark skin tone" and so on, down to "person".
"""

import hashlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

from capjax.data.records import Caption, Example, checked_index
from capjax.errors import UserError

if TYPE_CHECKING:
    from capjax.data.sources import Source

VAGUE = "vague"  # the source of the captions made here

_MANNERS = frozenset(
    ("red hair", "curly hair", "white hair", "blond hair", "bald", "beard", "facing right")
)
_HEAD_MANNER = re.compile(r" ((?:with|wearing) .+)$|^((?:left|right|up|down)wards) ")
_GENDER = re.compile(r"\b(?:women|woman|men|man|girl|boy|mermaid|merman)\b")
_SINGULAR = {"women": "woman", "men": "man"}
_NEUTRAL_ROLES = (  # of the part before the colon: pattern, and what stands there without gender
    (re.compile(r"^(?:woman and man|women|men)(?= )"), "people"),
    (re.compile(r"^(?:wo)?m[ae]n’s "), ""),
    (re.compile(r"^old (?:wo)?man$"), "older person"),
    (re.compile(r"^mer(?:maid|man)$"), "merperson"),
    (re.compile(r"^(?:girl|boy)$"), "child"),
    # "woman running", "man in tuxedo", but "woman pilot" is a pilot.
    (re.compile(r"\b(?:wo)?man(?=$| (?:in|with)\b| (?:\w+ )?\w+ing\b)"), "person"),
    (re.compile(r"^(?:wo)?man "), ""),
)
_GENERATIONS = {"woman": "adult", "man": "adult", "girl": "child", "boy": "child"}


class _Name(NamedTuple):
    """The parts of a short name: what is shown, of whom, and attributes."""

    head: str
    people: list[str]
    tones: list[str]
    manners: list[str]  # of the part behind the colon
    rest: list[str]


def attributes(caption: str) -> dict[str, list[str]]:
    """The attributes that a short name of the corpus has, by kind: "tone", "gender", "manner".

    In the words of the corpus' lexicon, in the order of the caption; "person" is no gender.
    """
    name = _parse(caption)
    genders = _GENDER.findall(", ".join((name.head, *name.people)))
    return {
        "tone": name.tones,
        "gender": [_SINGULAR.get(word, word) for word in genders],
        "manner": [*map("".join, _HEAD_MANNER.findall(name.head)), *name.manners],
    }


def make_vague(caption: str, is_dropped: Callable[[str], bool]) -> str:
    """The short name without what is dropped.

    `is_dropped` is asked once for "tone" (two people's tones go together: one would be said of
    both), once for "gender" and for each manner by its words.
    """
    name, found = _parse(caption), attributes(caption)
    if found["tone"] and is_dropped("tone"):
        name = name._replace(tones=[])
    dropped = [manner for manner in found["manner"] if is_dropped(manner)]
    head, people = name.head, name.people
    for manner in dropped:
        head = re.sub(rf"^{re.escape(manner)} | {re.escape(manner)}$", "", head)
    if not found["gender"] or is_dropped("gender"):
        head, people = _without_gender(head), _people_without_gender(name)
    kept = [manner for manner in name.manners if manner not in dropped]
    tail = ", ".join((*people, *name.tones, *kept, *name.rest))
    return f"{head}: {tail}" if tail else head


def _parse(caption: str) -> _Name:
    head, _, tail = caption.partition(": ")
    people, tones, manners, rest = [], [], [], []
    for part in filter(None, tail.split(", ")):
        if part.endswith(" skin tone"):
            tones.append(part)
        elif part in _MANNERS:
            manners.append(part)
        elif part in (*_GENERATIONS, "person", "adult", "child"):
            people.append(part)
        else:  # the country of a flag
            rest.append(part)
    return _Name(head, people, tones, manners, rest)


def _without_gender(head: str) -> str:
    for pattern, neutral in _NEUTRAL_ROLES:
        head, count = pattern.subn(neutral, head)
        if count:
            break
    return head


def _people_without_gender(name: _Name) -> list[str]:
    """A family's generations; a couple is only spelt out where its two tones are told apart."""
    if name.head == "family":
        return [_GENERATIONS.get(part, part) for part in name.people]
    return ["person" for _ in name.people] if len(name.tones) == 2 else []


class WithVague:
    """The examples of the embedded corpus, each with one more caption, of source "vague".

    It is the short name without its attributes, each left out with probability `fraction`,
    independently: a hash of the key and the attribute decides. `metadata["attributes"]` has those
    of the short name (`attributes`), and `metadata["said"]` the share of them in the vague caption
    (1 where there are none): how well it fits.
    """

    def __init__(self, source: "Source", fraction: float) -> None:
        self.source = source
        self.fraction = fraction

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex) -> Example:
        example = self.source[checked_index(index, self)]
        name = example.captions[0].text
        text = make_vague(name, lambda unit: _uniform(example.key, unit) < self.fraction)
        full = attributes(name)
        count, kept = (sum(map(len, found.values())) for found in (full, attributes(text)))
        said = kept / count if count else 1.0
        return example._replace(
            captions=(*example.captions, Caption(text, VAGUE)),
            metadata=example.metadata | {"attributes": full, "said": said},
        )

    def __repr__(self) -> str:
        return f"WithVague({self.source!r}; fraction={self.fraction})"


def vague_fraction(name: str, query: str) -> float:
    """The probability in the address `emoji:SPLIT?vague=0.7`. Raises `UserError`."""
    option, _, value = query.partition("=")
    try:
        fraction = float(value)
    except ValueError:
        fraction = -1.0
    if option != VAGUE or not 0 <= fraction <= 1:
        raise UserError(
            f"source {name!r}: expected no option but the probability of leaving out an attribute, "
            f"from 0 to 1, such as {name.partition('?')[0]}?{VAGUE}=0.7"
        )
    return fraction


def _uniform(key: str, unit: str) -> float:
    """A number in [0, 1), independent for every key and attribute."""
    digest = hashlib.blake2b(f"{key}\0{unit}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
