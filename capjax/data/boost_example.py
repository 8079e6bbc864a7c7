"""One example's new captions: what is asked of a language model for it, and what comes of that.

Pure functions of the example, the settings and the answers, after Visual Caption Boosting (Gaur et
al. 2024, "No Detail Left Behind").
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from capjax.data.boost_endpoint import Reply, RequestFailed
from capjax.data.boost_texts import (
    BLEND_PROMPT,
    HOLISTIC_PROMPT,
    check_prompt,
    clean_answer,
    fill,
    problem_of,
)
from capjax.data.captions import clean_text
from capjax.data.records import Caption, Example
from capjax.errors import UserError

KINDS = ("blend", "holistic")
Answer = Callable[[Mapping[str, Any]], Reply]
FAILED = "failed"  # no answer: asked for again by the next run


@dataclasses.dataclass(frozen=True)
class BoostSettings:
    """What decides the captions and the shards.

    `model`: its name at the endpoint; `request`: further fields of each request, such as
    `temperature`; `num_variants`: captions of each kind, asked for with `seed`, `seed` + 1, …;
    `sources`: of the captions that are blended (none: all); `split`, `shard_size`: as for
    `capjax data prepare`.
    """

    model: str
    blend_prompt: str = BLEND_PROMPT
    holistic_prompt: str = HOLISTIC_PROMPT
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    num_variants: int = 1
    sources: tuple[str, ...] = ()
    split: str = "train"
    shard_size: int = 10_000

    def __post_init__(self) -> None:
        for field in ("num_variants", "shard_size"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)}: expected at least 1")
        if not self.split or self.split.startswith(".") or set(self.split) & set("/\\*?[]"):
            raise UserError(f"split={self.split!r}: expected a part of a file name, as in 'train'")
        check_prompt(self.blend_prompt, "captions")
        check_prompt(self.holistic_prompt, "caption", "dense")

    def body(self, prompt: str, texts: Mapping[str, str], number: int) -> dict[str, Any]:
        """A request: the prompt with the texts in their places, for variant `number`."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": fill(prompt, texts)}],
            "seed": self.seed + number,
            **self.request,
        }
        return {name: value for name, value in body.items() if value is not None}


class Made(NamedTuple):
    """A new caption of the source `kind`, or the `problem` for which there is none.

    `answer` is what came, as it came; or why nothing did.
    """

    kind: str
    caption: Caption | None
    problem: str = ""
    answer: str = ""


Make = Callable[[Example, Answer], list[Made]]


def boosted(
    example: Example,
    settings: BoostSettings,
    dense: Mapping[str, str] | None,
    answer: Answer,
) -> Iterator[Made]:
    """The new captions of one example: blends and, where `dense` has its key, holistic captions.

    `answer` may raise `RequestFailed`. A single caption is its own blend. Without a blend there is
    no holistic caption.
    """
    human = human_captions(example, settings.sources)
    if not human:
        yield Made("blend", None, "no caption")
        return
    texts, language = [caption.text for caption in human], human[0].language
    for number in range(settings.num_variants):
        blend = Made("blend", Caption(texts[0], "blend", language))
        if len(texts) > 1:
            listed = {"captions": "\n".join(f"- {text}" for text in texts)}
            body = settings.body(settings.blend_prompt, listed, number)
            blend = _made("blend", language, body, answer, texts, " ".join(texts))
        yield blend
        if dense is None or blend.caption is None:
            continue
        if not (detail := clean_text(dense.get(example.key, ""), lower=False)):
            yield Made("holistic", None, "no dense caption")
            continue
        given = {"caption": blend.caption.text, "dense": detail}
        body = settings.body(settings.holistic_prompt, given, number)
        yield _made("holistic", language, body, answer, list(given.values()), given["caption"])


def human_captions(example: Example, sources: Sequence[str]) -> list[Caption]:
    """What is blended: captions of the wanted sources, in the language of the first, each once."""
    found: dict[str, Caption] = {}
    for caption in example.captions:
        text = clean_text(caption.text, lower=False)
        if text and caption.source not in KINDS and (not sources or caption.source in sources):
            found.setdefault(text.casefold(), caption._replace(text=text))
    captions = list(found.values())
    return [caption for caption in captions if caption.language == captions[0].language]


def _made(
    kind: str,
    language: str,
    body: Mapping[str, Any],
    answer: Answer,
    given: Sequence[str],
    anchor: str,
) -> Made:
    try:
        reply = answer(body)
    except RequestFailed as error:
        return Made(kind, None, FAILED, str(error))
    text = clean_answer(reply.text)
    problem = problem_of(text, reply.finish, given, anchor)
    return Made(kind, None if problem else Caption(text, kind, language), problem, reply.text)
