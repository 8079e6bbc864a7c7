"""From an example to the text of its training pair: which of its captions, cut and framed.

Pure functions of the example and a `numpy.random.Generator`. Each draws a fixed number of values,
so that a change of one setting leaves the other draws as they were.
"""

import dataclasses
import itertools
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capjax.data.records import Caption, Example
from capjax.errors import UserError

_PLACEHOLDERS = {"caption", "source", "dataset", "bin"}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class NoCaption(Exception):  # noqa: N818 (a state of the data, counted and replaced)
    """An example without a caption of the wanted sources."""


@dataclasses.dataclass(frozen=True)
class CaptionChoice:
    """Which captions of an example are used.

    `sources` weighs the captions by their `source`, e.g. {"tts": 0.8, "keyword": 0.2}: a source is
    drawn among those the example has, then one of its captions. Empty: every caption alike.
    `per_image`: captions drawn for a training example.

    In training a drawn caption is cut and framed: `sentences` keeps "all" of it, "one" random
    sentence, or a random "run" of them (they end in . ! or ? before white space); then one of
    `templates` is drawn, such as "a photo: {caption}", with `{source}` for the caption's source and
    `{dataset}` for the name of its source in a mixture. References are left as they are.
    `{bin}` is the number of `score_edges` (rising) up to the example's metadata field `score`, such
    as the similarity of image and text: a token for how well they fit (Kang et al. 2023, "Noise-
    aware Learning from Web-crawled Image-Text Data"). Without that field an example is not used.
    `max_tokens`: so many tokens of a text are kept, its end included; 0: as many as there is room.

    `datasets`: by the name of a source in a mixture, the choice that takes the place of this one
    in training; `per_image` is the same for all of them.
    """

    sources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    lower: bool = True
    per_image: int = 1
    sentences: str = "all"
    templates: Sequence[str] = ()
    max_tokens: int = 0
    score: str = ""
    score_edges: Sequence[float] = ()
    datasets: Mapping[str, "CaptionChoice"] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.per_image < 1:
            raise UserError(f"captions.per_image={self.per_image}: expected at least 1")
        if self.max_tokens < 0 or self.max_tokens == 1:
            raise UserError(f"captions.max_tokens={self.max_tokens}: expected 0, or 2 and more")
        if self.sentences not in ("all", "one", "run"):
            raise UserError(
                f"captions.sentences={self.sentences!r}: choose one of 'all', 'one', 'run'"
            )
        for template in self.templates:
            _check_template(template)
        edges = tuple(self.score_edges)
        rising = all(low < high for low, high in itertools.pairwise(edges))
        if bool(self.score) != bool(edges) or not rising:
            raise UserError(
                f"captions.score={self.score!r} and captions.score_edges={edges}: expected a field "
                "of the metadata and rising numbers, such as 'similarity' and (0.2, 0.25, 0.3)"
            )
        if any("{bin}" in template for template in self.templates) and not self.score:
            raise UserError("captions.templates has {bin}: name the field in captions.score")
        weights = self.sources.values()
        if any(not 0 <= weight < float("inf") for weight in weights) or (
            weights and sum(weights) == 0
        ):
            raise UserError(
                f"captions.sources={dict(self.sources)}: expected weights >= 0 that do not all "
                "vanish, as in {'tts': 0.8, 'keyword': 0.2}"
            )
        for name, own in self.datasets.items():
            if own.per_image != self.per_image:
                raise UserError(
                    f"captions.datasets.{name}.per_image={own.per_image}: expected that of all "
                    f"others; leave it out, or set captions.per_image={own.per_image}"
                )

    def of(self, dataset: str) -> "CaptionChoice":
        """The choice for a source of the mixture, by its name."""
        return self.datasets.get(dataset, self)


def clean_text(text: str, lower: bool) -> str:
    """Any run of white space becomes one space; lower-cased if wanted."""
    text = " ".join(text.split())
    return text.lower() if lower else text


def choose_captions(
    example: Example, choice: CaptionChoice, rng: np.random.Generator, dataset: str = ""
) -> list[str]:
    """The texts of `choice.per_image` random captions, as it weighs them. Raises `NoCaption`.

    `dataset`: the name in the mixture of the source that the example is of, whose choice holds.
    No caption is drawn twice before all were drawn. The second and later ones take their numbers
    from a generator of their own, so that their count changes no other draw; and so does what is
    drawn within a caption.
    """
    choice = choice.of(dataset)
    captions = left = _usable(example, choice)
    bits: Any = rng.bit_generator  # NumPy's base class does not name `jumped`
    within = np.random.Generator(bits.jumped(2)) if choice.sentences != "all" else None
    score_bin = _score_bin(example, choice)
    framing = np.random.Generator(bits.jumped(3)) if choice.templates else None
    texts = []
    for number in range(choice.per_image):
        if number == 1:
            rng = np.random.Generator(bits.jumped())
        caption = _draw(left, choice, rng.random(2))
        text = caption.text
        if within is not None:
            text = _some_sentences(text, choice.sentences == "one", within.random(2))
        if framing is not None:
            template = choice.templates[int(framing.random() * len(choice.templates))]
            text = template.format(
                caption=text, source=caption.source, dataset=dataset, bin=score_bin
            )
        texts.append(clean_text(text, choice.lower))
        left = [other for other in left if other is not caption] or captions
    return texts


def _score_bin(example: Example, choice: CaptionChoice) -> str:
    """The number of edges up to the example's score; "" without such a setting."""
    if not choice.score:
        return ""
    try:
        score = float(example.metadata[choice.score])
    except (KeyError, TypeError, ValueError):
        raise NoCaption(f"{example.key}: no number in metadata[{choice.score!r}]") from None
    if np.isnan(score):
        raise NoCaption(f"{example.key}: metadata[{choice.score!r}] is not a number")
    return str(int(np.searchsorted(choice.score_edges, score, side="right")))


def _some_sentences(text: str, is_one: bool, u: np.ndarray) -> str:
    """One sentence of the text, or a run: its length, then its place, from two uniform numbers."""
    sentences = [part for part in _SENTENCE_END.split(text) if part.strip()]
    length = 1 if is_one else 1 + int(u[0] * len(sentences))
    start = int(u[1] * (len(sentences) - length + 1))
    return " ".join(sentences[start : start + length])


def _check_template(template: str) -> None:
    """Raises `UserError` where it cannot be filled in, or leaves the caption out."""
    try:
        names = [
            f"{name}{spec}{conversion or ''}"
            for _, name, spec, conversion in string.Formatter().parse(template)
            if name is not None
        ]
    except ValueError as error:
        names = [str(error)]
    if "caption" not in names or not set(names) <= _PLACEHOLDERS:
        raise UserError(
            f"captions.templates: {template!r}: expected a text with {{caption}} in it, and "
            "nothing else in braces but {source}, {dataset} and {bin}"
        )


def _draw(captions: list[Caption], choice: CaptionChoice, u: np.ndarray) -> Caption:
    """One of the captions, from two uniform numbers: its source, then which of that source."""
    if choice.sources:
        names = list(dict.fromkeys(caption.source for caption in captions))
        ends = np.cumsum([choice.sources[name] for name in names])
        source = names[int(np.searchsorted(ends, u[0] * ends[-1], side="right"))]
        captions = [caption for caption in captions if caption.source == source]
    return captions[int(u[1] * len(captions))]


def first_caption(example: Example, choice: CaptionChoice) -> str:
    """The reference: the first caption of the heaviest source. Raises `NoCaption`."""
    captions = _usable(example, choice)
    best = max(captions, key=lambda caption: choice.sources.get(caption.source, 0.0))
    return clean_text(best.text, choice.lower)


def reference_texts(example: Example, choice: CaptionChoice) -> list[str]:
    """The captions that the choice draws from, in their order, as they are."""
    try:
        return [clean_text(caption.text, choice.lower) for caption in _usable(example, choice)]
    except NoCaption:
        return []


def caption_texts(example: Example, choice: CaptionChoice, dataset: str = "") -> list[str]:
    """The same, framed by the templates in turn; for training a tokenizer."""
    choice = choice.of(dataset)
    try:
        captions, score_bin = _usable(example, choice), _score_bin(example, choice)
    except NoCaption:
        return []
    templates = choice.templates or ("{caption}",)
    return [
        clean_text(
            templates[i % len(templates)].format(
                caption=caption.text, source=caption.source, dataset=dataset, bin=score_bin
            ),
            choice.lower,
        )
        for i, caption in enumerate(captions)
    ]


def _usable(example: Example, choice: CaptionChoice) -> list[Caption]:
    wanted = [
        caption
        for caption in example.captions
        if (not choice.sources or choice.sources.get(caption.source, 0.0) > 0)
        and not caption.text.isspace()
        and caption.text
    ]
    if not wanted:
        have = sorted({caption.source for caption in example.captions})
        raise NoCaption(f"{example.key}: sources {have}, wanted {sorted(choice.sources) or 'any'}")
    return wanted
