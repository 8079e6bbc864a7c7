"""N captions of an image put in a better order: by likelihood, by similarity, by confidence.

Each score is a pure function of arrays, larger for a better caption: `score.total` and `score.mean`
for the likelihood, with or without the prior; `similarity`; `content_confidence`. `rerank` puts a
record in their order.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from capjax.errors import UserError

# English words that carry grammar rather than content: articles, pronouns, prepositions,
# conjunctions, auxiliary verbs, "there", "not", and "very". Numbers are content, and so are places
# such as "left".
FUNCTION_WORDS = frozenset(
    word
    for line in (
        "a an the this that these those some any each every both either neither no such",
        "i me mine my you your yours he him his she her hers it its we us our ours they them",
        "their theirs itself himself herself themselves who whom whose which what",
        "of in on at by for with without from to into onto over under above below between among",
        "through across along around about against near behind beside besides beyond during before",
        "after up down off out inside outside toward towards upon within via per as like than",
        "and or but nor so yet if because while although though when where whether until since",
        "am is are was were be been being has have had having do does did doing done",
        "will would shall should can could may might must",
        "there here not very too also just only then",
    )
    for word in line.split()
)
_WORD = re.compile(r"\w+(?:['’]\w+)*")


class WordConfidence(NamedTuple):
    """A word of a caption, and the mean probability of the tokens that spell it."""

    word: str
    confidence: float


def similarity(image_BD: np.ndarray, text_BSD: np.ndarray) -> np.ndarray:
    """[B, S]: cosines of each image with its captions, from embeddings of length 1."""
    return np.einsum("BD,BSD->BS", image_BD, text_BSD)


def word_confidences(
    ids: Sequence[int],
    logprobs: Sequence[float] | np.ndarray,
    decode: Callable[[Sequence[int]], str],
) -> list[WordConfidence]:
    """The words of a caption; a token that spells several, as a phrase may be, counts for each.

    Args:
      ids: of the caption, without its end and padding.
      logprobs: log-probability of each, such as `score_tokens` gives.
      decode: the tokenizer's; what a token adds to the text is what it spells.
    """
    text, spans = "", []
    for stop in range(1, len(ids) + 1):
        longer = decode(ids[:stop])
        spans.append((len(text), len(longer)))
        text = longer
    probabilities = np.exp(np.asarray(logprobs, np.float64))
    found = []
    for match in _WORD.finditer(text):
        spells = [low < match.end() and high > match.start() for low, high in spans]
        if any(spells):
            confidence = float(probabilities[: len(spans)][spells].mean())
            found.append(WordConfidence(match.group(), confidence))
    return found


def content_confidence(words: Sequence[WordConfidence]) -> float:
    """The mean confidence of the words that are not `FUNCTION_WORDS`; 0 where there is none.

    After the token-level confidence of Petryk et al. 2024, "Simple Token-Level Confidence Improves
    Caption Correctness".
    """
    content = [c for word, c in words if word.lower().replace("’", "'") not in FUNCTION_WORDS]
    return float(np.mean(content)) if content else 0.0


def rerank(record: dict[str, Any], scores_S: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """The record with its `captions` by falling score, and the best one's fields as its own.

    Each caption gets its `score`; equal ones keep their order. Raises `UserError` for a record
    without `captions`, and unless there is one finite score a caption.
    """
    key = record.get("key")
    if "captions" not in record:
        raise UserError(f"record {key!r} has no captions to choose from: set num_captions above 1")
    captions, scores_S = record["captions"], np.asarray(scores_S, np.float64)
    if scores_S.shape != (len(captions),) or not np.all(np.isfinite(scores_S)):
        raise UserError(
            f"record {key!r}: scores {scores_S.tolist()} for {len(captions)} captions: expected "
            "one finite number each"
        )
    order = np.argsort(-scores_S, kind="stable")
    ordered = [captions[i] | {"score": float(scores_S[i])} for i in order]
    # What was said of the caption that was first is not true of another.
    about = {name: value for name, value in record.items() if name != "filtered"}
    return about | ordered[0] | {"captions": ordered}
