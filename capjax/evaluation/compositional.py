"""Which caption goes with which image: scores of both, the rules of the tests, and their figures.

A caption's score is its log-likelihood, or that minus alpha times its log-likelihood without image
(Lin et al. 2023, "VisualGPTScore"). Beside them stands what the captions alone give away: the score
without any image. A test that it passes asks for language, not for sight. Letters beyond
`capjax.dims`: N items, I images and C captions of an item, S captions of a row.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from capjax.data.compositional import Item
from capjax.data.tokenizer import PAD_ID
from capjax.decoding.score import score_tokens, total
from capjax.dims import Array, Batch, Float, Int, Params
from capjax.evaluation.intervals import intervals, mean_of
from capjax.evaluation.measured import Measured
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa
from capjax.models.two_towers import TwoTowers

RULES = ("text", "image", "group")
MAX_KINDS = 12  # a test of more kinds has no figure for each


class Macro(NamedTuple):
    """A mean over kinds instead of items: without some kinds, and those of few items."""

    dropped: frozenset[str] = frozenset()
    min_items: int = 1


# The relations that ARO's mean leaves out, as the notebook beside its code lists them.
_LEFT_OUT = (
    "adjusting, around, attached to, beside, between, bigger than, biting, boarding, brushing, "
    "by, chewing, cleaning, climbing, close to, coming from, coming out of, contain, crossing, "
    "dragging, draped over, drinking, drinking from, driving, driving down, driving on, eating "
    "from, eating in, enclosing, exiting, facing, filled with, floating in, floating on, "
    "flying, flying above, flying in, flying over, flying through, full of, going down, going "
    "into, going through, grazing in, growing in, growing on, guiding, hanging from, hanging "
    "in, hanging off, hanging over, higher than, holding onto, hugging, in between, jumping "
    "off, jumping on, jumping over, kept in, larger than, leading, leaning over, leaving, "
    "licking, longer than, looking in, looking into, looking out, looking over, looking "
    "through, lying next to, lying on top of, making, mixed with, mounted on, moving, near, "
    "next to, of, on the back of, on the edge of, on the front of, on the other side of, on the "
    "side of, opening, painted on, parked at, parked beside, parked by, parked in, parked in "
    "front of, parked near, parked next to, perched on, petting, piled on, playing, playing in, "
    "playing on, playing with, pouring, reaching for, reading, reflected on, riding on, running "
    "in, running on, running through, seen through, sitting behind, sitting beside, sitting by, "
    "sitting in front of, sitting near, sitting next to, sitting under, skiing down, skiing on, "
    "sleeping in, sleeping on, smiling at, sniffing, splashing, sprinkled on, stacked on, "
    "standing against, standing around, standing behind, standing beside, standing in front of, "
    "standing near, standing next to, staring at, stuck in, surrounding, swimming in, swinging, "
    "talking to, topped with, touching, traveling down, traveling on, tying, typing on, "
    "underneath, wading in, waiting for, walking across, walking by, walking down, walking next "
    "to, walking through, with, working in, working on, worn on, wrapped around, wrapped in"
)
MACROS = {
    "aro_relation": Macro(dropped=frozenset(_LEFT_OUT.split(", "))),
    "aro_attribution": Macro(min_items=25),
}


def judge(scores_IC: np.ndarray, truth_IC: np.ndarray) -> tuple[float, float, float]:
    """(text, image, group) of an item, each 1 or 0; NaN where its question is not asked.

    text: of every image each true caption scores above each false one. image: by every caption each
    true image scores above each false one. group: both. A tie is wrong. With two images and their
    captions these are Winoground's rules (Thrush et al. 2022); with one image, a choice of captions
    (SugarCrepe, ARO); with one caption, NLVR2's consistency.
    """
    text = _all_above(scores_IC, truth_IC)
    image = _all_above(np.transpose(scores_IC), np.transpose(truth_IC))
    return text, image, text * image  # NaN where either is


def _all_above(scores: np.ndarray, truth: np.ndarray) -> float:
    asked = [
        min(row[true]) > max(row[~true])
        for row, true in zip(scores, np.asarray(truth, bool), strict=True)
        if true.any() and not true.all()
    ]
    return float(all(asked)) if asked else np.nan


def measure_items(
    test: str, items: Sequence[Item], scores: Mapping[str, Sequence[np.ndarray]]
) -> Measured:
    """The figures of a test: for every rule that it asks for, the share of items that pass.

    Args:
      scores: by what scores: the scores [I, C] of each item. "likelihood" is the one that names no
        suffix: `<test>_text`, `<test>_text_null_image` and so on.

    Where the items are of several kinds, and not of too many, `<test>_<kind>_text` and the like are
    of one kind. ARO's tests have `<test>_macro_text`: the mean over kinds (see `MACROS`).
    """
    kinds = np.array([_name(item.kind) for item in items])
    metrics: dict[str, float] = {}
    values: dict[str, np.ndarray] = {}
    for scorer, of_items in scores.items():
        suffix = "" if scorer == "likelihood" else f"_{scorer}"
        judged_NR = np.array(
            [judge(of, np.array(item.truth)) for of, item in zip(of_items, items, strict=True)]
        )
        for rule, passed_N in zip(RULES, judged_NR.T, strict=True):
            if np.isnan(passed_N).all():
                continue
            values[f"{test}_{rule}{suffix}"] = passed_N
            if 1 < len(set(kinds)) <= MAX_KINDS:
                for kind in sorted(set(kinds)):
                    of_kind_N = np.where(kinds == kind, passed_N, np.nan)
                    values[f"{test}_{kind}_{rule}{suffix}"] = of_kind_N
            if test in MACROS:
                names = [item.kind for item in items]
                metrics[f"{test}_macro_{rule}{suffix}"] = macro(passed_N, names, MACROS[test])
    metrics |= {name: float(np.nanmean(x)) for name, x in values.items() if not np.isnan(x).all()}
    return Measured(
        metrics,
        values,
        tuple(item.key for item in items),
        intervals({name: mean_of(x) for name, x in values.items()}),
    )


def macro(passed_N: np.ndarray, kinds: Sequence[str], by: Macro) -> float:
    """The mean over kinds of the share of their items that pass; NaN where no kind is left."""
    found: dict[str, list[float]] = {}
    for kind, passed in zip(kinds, passed_N.tolist(), strict=True):
        found.setdefault(kind, []).append(passed)
    shares = [
        np.mean(of)
        for kind, of in found.items()
        if kind not in by.dropped and len(of) >= by.min_items
    ]
    return float(np.mean(shares)) if shares else np.nan


@functools.partial(jax.jit, static_argnums=(0, 1))
def score_rows(
    generator: Captioner | CoCa | None,
    embedder: TwoTowers | CoCa | None,
    params: Params,
    batch: Batch,
) -> dict[str, Array]:
    """Scores [B, S] of S captions an image, each by the name that `measure_items` suffixes.

    Args:
      generator: gives "likelihood" and "confidence".
      embedder: gives "towers", the cosine of image and caption.
      batch: `image`, and what the two read: `labels` [B, S, L], `texts` [B, S, L], ids as the
        tokenizer's `encode` gives them.
    """
    found: dict[str, Array] = {}
    if generator is not None:
        labels_BSL = batch["labels"]
        logprobs_BSL = score_tokens(generator, params, batch["image"], labels_BSL)
        found["likelihood"] = total(logprobs_BSL)
        found["confidence"] = token_confidence(logprobs_BSL, labels_BSL)
    if embedder is not None:
        texts_BSL = batch["texts"]
        image_BD = embedder.embed_image(params, embedder.encode(params, batch["image"]))
        cosines = [
            jnp.sum(image_BD * embedder.embed_text(params, texts_BSL[:, s]), axis=-1)
            for s in range(texts_BSL.shape[1])
        ]
        found["towers"] = jnp.stack(cosines, axis=1)
    return found


@functools.partial(jax.jit, static_argnums=0)
def score_without_image(
    model: Captioner | CoCa, params: Params, labels_BSL: Int[Array, "B S L"]
) -> Float[Array, "B S"]:
    """log p of each caption where the model sees no image: the prior."""
    return total(score_tokens(model, params, None, labels_BSL))


def token_confidence(logprobs: Array, labels: Array) -> Array:
    """[...] of [..., L]: the mean probability of a caption's tokens, its end included.

    It does not favour short captions, as their summed log-probability does. 0 where there is no
    token. Source: Petryk et al. 2024, "Simple Token-Level Confidence Improves Caption Correctness",
    TLC-A.
    """
    is_token = labels != PAD_ID
    probabilities = jnp.where(is_token, jnp.exp(logprobs), 0.0)
    return probabilities.sum(-1) / is_token.sum(-1).clip(1)


def _name(kind: str) -> str:
    """As part of a metric's name."""
    return re.sub(r"\W+", "_", kind.lower()).strip("_")
