"""What a caption mentions, by a lexicon: words and phrases, the thing each stands for, its kind.

The rules of COCO are those of CHAIR (Rohrbach et al. 2018, "Object Hallucination in Image
Captioning"), whose file of synonyms (a line a thing: its name, then its synonyms, split by commas)
is read as it is.
"""

import dataclasses
import functools
import re
from collections.abc import Container, Iterable, Iterator, Mapping

from etils import epath

from capjax.errors import UserError

# Two words that CHAIR reads as one, a synonym in its file or of no meaning there ...
COCO_PAIRS = (
    *("motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal"),
    *("stop light", "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball"),
    *("baseball bat", "baseball glove", "tennis racket", "wine glass", "hot dog", "cell phone"),
    *("mobile phone", "teddy bear", "hair drier", "potted plant", "laptop computer", "home plate"),
)
# ... and those of which one word counts: "baby" and "adult" are no persons before an animal.
COCO_ANIMALS = (
    *("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    *("animal", "cub"),
)
COCO_MEANINGS = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in COCO_ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
}
COCO_HIDDEN = {"seat": "toilet"}  # no chair
OBJECT = "object"

# Words that name nothing to be seen.
FUNCTION_WORDS = frozenset(
    (
        *("a", "an", "the", "of", "in", "on", "at", "to", "by", "for", "from", "with", "without"),
        *("and", "or", "no", "not", "is", "are", "be", "it", "its"),
    )
)
IRREGULAR = dict(
    (
        *(("people", "person"), ("men", "man"), ("women", "woman"), ("children", "child")),
        *(("mice", "mouse"), ("geese", "goose"), ("feet", "foot"), ("teeth", "tooth")),
    )
)
_WORD = re.compile(r"\w+(?:[-'’]\w+)*")
_OWNER = re.compile(r"['’]s?$")


@dataclasses.dataclass(frozen=True, eq=False)
class Lexicon:
    """Words and phrases, and what they stand for.

    Attributes:
      names: by a word or phrase, as a tuple of lower-case words, the thing it stands for; None: it
        stands for nothing, and keeps its words from being read one by one.
      kinds: by a thing, its kind, such as "tone".
      hidden: by a word, a thing in whose company it stands for nothing.
    """

    names: Mapping[tuple[str, ...], str | None]
    kinds: Mapping[str, str]
    hidden: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def words(self) -> frozenset[str]:
        """All words of all phrases."""
        return frozenset(word for phrase in self.names for word in phrase)

    @functools.cached_property
    def longest(self) -> int:
        """Words of the longest phrase."""
        return max(map(len, self.names))


def read_lexicon(path: epath.PathLike) -> Lexicon:
    """A file with a line a thing: its name, then other words or phrases for it, split by commas.

    A line such as `[tone]` gives the kind of the things below it ("object" without one); `#` begins
    a comment. Where a phrase stands in two lines the last one counts, as in CHAIR. Raises
    `UserError` where the file cannot be read.
    """
    names: dict[tuple[str, ...], str | None] = {}
    kinds, kind = {}, OBJECT
    for line in _lines(path):
        if line.startswith("[") and line.endswith("]"):
            kind = line[1:-1].strip()
            continue
        phrases = [" ".join(phrase.lower().split()) for phrase in line.split(",")]
        for phrase in filter(None, phrases):
            names[tuple(phrase.split())] = phrases[0]
            kinds[phrases[0]] = kind
    if not names:
        raise UserError(f"{path}: expected a line for each thing, found none")
    return Lexicon(names, kinds)


def coco_lexicon(path: epath.PathLike) -> Lexicon:
    """The file of synonyms of CHAIR, with its rules for COCO. Raises as `read_lexicon`."""
    read = read_lexicon(path)
    names: dict[tuple[str, ...], str | None] = {}
    names |= {phrase: name for phrase, name in read.names.items() if len(phrase) == 1}
    for pair in COCO_PAIRS:
        names[tuple(pair.split())] = read.names.get(tuple(pair.split()))
    for pair, meaning in COCO_MEANINGS.items():
        names[tuple(pair.split())] = read.names.get((meaning,))
    return Lexicon(names, read.kinds, COCO_HIDDEN)


def with_words_of(lexicon: Lexicon, texts: Iterable[str], kind: str = "word") -> Lexicon:
    """The same, where every other word of the texts that may be seen is a thing of its own."""
    found = {word for text in texts for word in _WORD.findall(text.lower())} - FUNCTION_WORDS
    new = {word for word in found if (word,) not in lexicon.names and not word.isdecimal()}
    things = {word: next((w for w in _singulars(word) if w in new), word) for word in sorted(new)}
    names = {(word,): thing for word, thing in things.items()}
    kinds = dict.fromkeys(things.values(), kind)
    return Lexicon({**names, **lexicon.names}, {**kinds, **lexicon.kinds}, lexicon.hidden)


def mentions(text: str, lexicon: Lexicon) -> list[str]:
    """The things that a text mentions, in order, each time anew; the longest phrase counts."""
    words = [_known_form(word, lexicon.words) for word in _WORD.findall(text.lower())]
    found, start = [], 0
    while start < len(words):
        ends = range(min(start + lexicon.longest, len(words)), start, -1)
        end = next((end for end in ends if tuple(words[start:end]) in lexicon.names), 0)
        if end:
            phrase = tuple(words[start:end])
            found.append((phrase[0] if len(phrase) == 1 else "", lexicon.names[phrase]))
        start = end or start + 1
    all_names = {name for _, name in found}
    return [
        name
        for word, name in found
        if name is not None and lexicon.hidden.get(word, "") not in all_names
    ]


def _lines(path: epath.PathLike) -> Iterator[str]:
    try:
        text = epath.Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a lexicon ({type(error).__name__}: {error})") from error
    for line in text.splitlines():
        yield line.partition("#")[0].strip()


def _known_form(word: str, known: Container[str]) -> str:
    """The word, or its singular where only that is known."""
    candidates = (word, _OWNER.sub("", word), *_singulars(word))
    return next((form for form in candidates if form in known), word)


def _singulars(word: str) -> Iterator[str]:
    """What an English word may be the plural of."""
    if word in IRREGULAR:
        yield IRREGULAR[word]
    for ending, singulars in (("ies", ("y",)), ("ves", ("f", "fe")), ("es", ("",)), ("s", ("",))):
        if word.endswith(ending) and not word.endswith("ss"):
            yield from (word[: -len(ending)] + singular for singular in singulars)
