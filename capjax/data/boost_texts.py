"""What a language model is asked for a better caption, and which of its answers are one.

After Visual Caption Boosting (Gaur et al. 2024, "No Detail Left Behind"): a blend of several human
captions, and a holistic caption, the blend with the details of a dense caption. The prompts are
ours.
"""

import re
from collections.abc import Mapping, Sequence

from capjax.data.prepare_example import clean_caption
from capjax.errors import UserError

BLEND_PROMPT = """\
Several people have described the same image:
{captions}

Merge their descriptions into one caption of the image, in their language. Keep every detail that \
they mention and say it once. Add nothing that none of them says. Where they disagree, follow the \
majority. Answer with the caption alone, in one paragraph of plain text."""
HOLISTIC_PROMPT = """\
A caption of an image, made of what people have written. It is right:
{caption}

A longer description of the same image, by a machine. It may be wrong:
{dense}

Rewrite the caption, in its language. Keep all that it says, and add the details of the \
description that agree with it. Where they disagree, follow the caption. Answer with the caption \
alone, in one paragraph of plain text."""

_SPARE_WORDS = 10  # an answer may have more words than what it was made of, for joining it
# Of the runs of three letters: translations of captions share 0.05 to 0.17 with them, free blends
# 0.5 and more; the blends keep 0.4 and more of what people wrote.
_LEAST_SHARED = 0.2
_LEAST_KEPT = 0.15
_RUN = 3
_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_MARKUP = re.compile(r"^\s*(#+|[-*>\u2022]|\d+[.)])\s+|\*\*|(?<!\w)__|__(?!\w)|`+\w*", re.MULTILINE)
_PREFACE = re.compile(
    r"\A(sure|certainly|of course|okay|absolutely)\b(?=[^\w\s])[^\w\s]*\s*", re.IGNORECASE
)
_LABEL = re.compile(
    r"\A(here('s|\u2019s| is)\b[^:.]{0,80}|(the )?"
    r"((merged|blended|combined|final|new|single|holistic|rewritten) )*"
    r"(caption|answer|description))\s*(:\s*|\Z)",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\A(i('m| am|\u2019m)? (sorry|unable|apologi[sz]e|cannot|can't|can\u2019t|do not|don't)\b|"
    r"sorry[,.]|as an ai\b|unfortunately\b|i need (more|the)\b|please provide\b)",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb"}


def fill(prompt: str, texts: Mapping[str, str]) -> str:
    """The prompt with `{name}` replaced for each of the texts; other braces stay."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in texts), lambda m: texts[m[0][1:-1]], prompt)


def check_prompt(prompt: str, *places: str) -> None:
    """Raises `UserError` where the prompt lacks a place for what is merged."""
    for place in places:
        if f"{{{place}}}" not in prompt:
            raise UserError(f"prompt={prompt!r:.60}: expected {{{place}}} where it is filled in")


def clean_answer(text: str) -> str:
    """The caption in an answer: its first paragraph without thoughts, markup, labels and quotes."""
    plain = _MARKUP.sub("", _THOUGHTS.sub("", text))
    caption = ""
    for paragraph in re.split(r"\n\s*\n", plain):
        caption = _LABEL.sub("", _PREFACE.sub("", clean_caption(paragraph)))
        if caption:
            break
    while len(caption) > 1 and _QUOTES.get(caption[0]) == caption[-1]:
        caption = caption[1:-1].strip()
    return caption


def problem_of(caption: str, finish: str, given: Sequence[str], anchor: str) -> str:
    """Why a cleaned answer is no caption of what was `given`; "" where it is one.

    `anchor`: of what was given, the text that must not be lost. `finish`: as endpoints tell it.
    """
    if finish == "length":
        return "cut off"
    if finish == "content_filter" or _REFUSAL.match(caption):
        return "refused"
    if not caption:
        return "empty"
    if len(caption.split()) > sum(len(text.split()) for text in given) + _SPARE_WORDS:
        return "too long"
    if _share(caption, " ".join(given)) < _LEAST_SHARED:
        return "other words"
    if _share(anchor, caption) < _LEAST_KEPT:
        return "human text lost"
    return ""


def _share(text: str, of: str) -> float:
    """The share of the text's runs of letters that the other text has."""
    runs, others = _runs(text), _runs(of)
    return len(runs & others) / max(len(runs), 1)


def _runs(text: str) -> set[str]:
    words = "".join(c if c.isalnum() else " " for c in text.casefold()).split()
    return {f" {word} "[i : i + _RUN] for word in words for i in range(len(word))}
