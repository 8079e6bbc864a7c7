"""What two towers that had no part in making them say of captions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capjax.data.bags import build_bags_of_sizes
from capjax.data.captions import clean_text
from capjax.decoding.inputs import ImageLike
from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError
from capjax.evaluation.intervals import intervals, mean_of
from capjax.evaluation.measured import Measured, join
from capjax.evaluation.retrieval import measure_retrieval
from capjax.evaluation.self_retrieval import bags, caption_to_image, random_distractors
from capjax.evaluation.splits import CaptionRecord
from capjax.rewards.clip_score import (
    PROMPT,
    WEIGHTS,
    clip_score,
    reference_score,
    with_references,
)

BAG_SIZES = (3, 5, 7)


@dataclasses.dataclass(frozen=True)
class Judging:
    """How captions are judged.

    Attributes:
      measure: "clip_score", or "pac_score" where the judge has the weights of PAC-S.
      prompt: what texts begin with for the scores; retrieval reads them without.
      w: what the cosine is multiplied by; 0: the measure's own, 2.5 or 2.
      seed: of the first of the shuffles of random distractors.
      bag_sizes: of the bags that are built from the judge's embeddings of the images.
      batch_size: images and texts embedded at a time.
    """

    measure: str = "clip_score"
    prompt: str = PROMPT
    w: float = 0.0
    seed: int = 0
    bag_sizes: Sequence[int] = BAG_SIZES
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.measure not in WEIGHTS:
            raise UserError(f"measure={self.measure!r}: choose one of {', '.join(WEIGHTS)}")


def judge_captions(
    judge: LoadedModel,
    records: Sequence[CaptionRecord],
    images: Sequence[ImageLike],
    judging: Judging = Judging(),
    *,
    bags_of: Mapping[int, Sequence[Sequence[str]]] | None = None,
    **fields: Any,
) -> Measured:
    """The scores of captions and references, what captions retrieve, and what references do.

    Args:
      records: of captions, with the references if there are any; images: theirs, in their order.
      bags_of: bags of keys by size, in place of those built of the judge's embeddings, in which
        no two images have the same first reference.
      fields: of `Judging`, before those of `judging`.

    Returns clip_score and ref_clip_score (or of the measure's name), what `caption_to_image`,
    `random_distractors` and `bags` measure, and of the references `measure_retrieval`. Raises
    `UserError` for a judge without towers or an image that cannot be read.
    """
    judging = dataclasses.replace(judging, **fields)
    if not records or len(records) != len(images):
        raise UserError(f"{len(records)} captions for {len(images)} images: give one each")
    keys = [record.key for record in records]
    image_ND = judge.embed_images(images, judging.batch_size)
    caption_ND = _embed(judge, [record.caption for record in records], "", judging)
    reference_E = [reference for record in records for reference in record.references]
    row_E = np.repeat(np.arange(len(records)), [len(record.references) for record in records])
    if bags_of is None:
        same_N = [record.references[0] if record.references else record.key for record in records]
        built = build_bags_of_sizes(image_ND, judging.bag_sizes, same_N=same_N)
        bags_of = {
            size: [[keys[row] for row in bag] for bag in found] for size, found in built.items()
        }
    parts = {
        "scores": _scores(judge, records, image_ND, reference_E, row_E, judging),
        "caption to image": caption_to_image(caption_ND, image_ND, keys, judge.mesh),
        "distractors": random_distractors(caption_ND, image_ND, keys, seed=judging.seed),
        "bags": bags(caption_ND, image_ND, keys, bags_of),
    }
    if len(np.unique(row_E)) == len(records):
        parts["references"] = _reference_retrieval(
            judge, keys, image_ND, reference_E, row_E, judging
        )
    else:
        reason = "some images have no reference"
        parts["references"] = Measured({}, skipped={"image_to_text_r1": reason})
    return join(parts)


def _scores(
    judge: LoadedModel,
    records: Sequence[CaptionRecord],
    image_ND: np.ndarray,
    reference_E: list[str],
    row_E: np.ndarray,
    judging: Judging,
) -> Measured:
    """The measure and, of the captions that have references, the one with references."""
    name, texts = judging.measure, [record.caption for record in records]
    length = judge.embedder.config.text_length
    prompt_tokens = judge.tokenizer.count(judging.prompt) if judging.prompt else 0
    if 2 * prompt_tokens > length:
        reason = (
            f"{prompt_tokens} of the {length} tokens that the judge reads are the prompt "
            f"{judging.prompt!r}; score without one (judge_prompt empty)"
        )
        return Measured({}, skipped={name: reason, f"ref_{name}": reason})
    w = judging.w or WEIGHTS[name]
    caption_ND = _embed(judge, texts, judging.prompt, judging)
    score_N = clip_score(image_ND, caption_ND, w)
    items, skipped = {name: score_N}, {}
    if reference_E:
        reference_ED = _embed(judge, reference_E, judging.prompt, judging)
        best_N = reference_score(caption_ND, reference_ED, row_E)
        items[f"ref_{name}"] = with_references(score_N, best_N)
    else:
        skipped[f"ref_{name}"] = "no references"
    notes = {
        "w": w,
        "prompt": judging.prompt,
        "text_length": length,
        "judge_step": judge.step,
        "cut_captions": _num_cut(judge, texts, judging.prompt, length),
        "cut_references": _num_cut(judge, reference_E, judging.prompt, length),
    }
    return Measured(
        {metric: float(np.nanmean(values)) for metric, values in items.items()},
        items,
        tuple(record.key for record in records),
        intervals=intervals({metric: mean_of(values) for metric, values in items.items()}),
        skipped=skipped,
        notes={f"{name}_{field}": value for field, value in notes.items()},
    )


def _reference_retrieval(
    judge: LoadedModel,
    keys: Sequence[str],
    image_ND: np.ndarray,
    reference_E: list[str],
    row_E: np.ndarray,
    judging: Judging,
) -> Measured:
    """Images find their references and these their images; equal references are one text."""
    texts, text_E = np.unique(np.array(reference_E, object), return_inverse=True)
    image_P, text_P = np.unique([row_E, text_E], axis=1)
    text_MD = _embed(judge, texts.tolist(), "", judging)
    return measure_retrieval(
        image_ND, text_MD, image_P, text_P, keys=keys, texts=texts.tolist(), mesh=judge.mesh
    )


def _embed(judge: LoadedModel, texts: Sequence[str], prompt: str, judging: Judging) -> np.ndarray:
    """Of each distinct text once."""
    distinct, row = np.unique([prompt + text for text in texts], return_inverse=True)
    return judge.embed_texts(distinct.tolist(), judging.batch_size)[row]


def _num_cut(judge: LoadedModel, texts: Sequence[str], prompt: str, length: int) -> int:
    """How many texts are longer than the judge reads, the end included."""
    lower = judge.config.get("captions", {}).get("lower", False)
    return sum(judge.tokenizer.count(clean_text(prompt + text, lower)) > length for text in texts)
