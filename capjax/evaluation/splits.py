"""What a captioner says of one split: its captions and their agreement with the references."""

import collections
import json
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from capjax.data.records import Example
from capjax.data.sources import Source
from capjax.data.tokenizer import Tokenizer
from capjax.decoding.generate import generate
from capjax.decoding.options import GREEDY, DecodingOptions
from capjax.decoding.prefix import forced
from capjax.dims import Params
from capjax.evaluation import captions
from capjax.evaluation.agreement import measure_captions
from capjax.evaluation.hallucination import measure_hallucination
from capjax.evaluation.intervals import intervals, mean_of
from capjax.evaluation.lexicon import Lexicon
from capjax.evaluation.measured import Measured, join
from capjax.mesh import place_batch
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa
from capjax.training.workdir import write_atomic


class CaptionRecord(NamedTuple):
    """A line of `captions/<split>.jsonl`."""

    key: str
    source: str  # what `open_source` opens
    index: int  # the row there
    caption: str
    references: list[str]
    exact: bool
    unigram_f1: float
    logprob: float  # summed over the tokens, end of caption included
    num_tokens: int
    guidance_scale: float
    seed: int
    step: int


def caption_split(
    model: Captioner | CoCa,
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    mesh: Mesh,
    tokenizer: Tokenizer,
    source: Source,
    source_name: str,
    references: Callable[[Example], list[str]],
    step: int,
    options: DecodingOptions = GREEDY,
    prefix: Sequence[int] = (),
) -> list[CaptionRecord]:
    """Captions of every unmasked row of `batches`, in the order of the rows.

    Args:
      batches: this process's rows, as `data.pipeline.eval_batches` yields them.
      references: the reference captions of an example; without any it is not scored.
      step: of the parameters, for the records.
      options: greedy, or greedy with guidance.
      prefix: ids that captions stand behind; they are no part of the records.

    Every process returns the same.
    """
    rows: dict[int, tuple[str, float, int]] = {}
    for batch in batches:
        placed = place_batch(mesh, {name: batch[name] for name in ("image", "index", "mask")})
        with jax.set_mesh(mesh):
            made = generate(
                model,
                params,
                placed["image"],
                options,
                index_B=placed["index"],
                mask_B=placed["mask"],
                forced_BL=forced(prefix, len(placed["mask"])),
            )
        first = (made.tokens_BSL[:, 0], made.logprobs_BSL[:, 0], made.num_tokens_BS[:, 0])
        gathered = multihost_utils.process_allgather(
            (*first, placed["index"], placed["mask"]), tiled=True
        )
        for tokens, logprobs, num_tokens, index, is_row in zip(*gathered, strict=True):
            if is_row:
                text = tokenizer.decode(tokens[len(prefix) :].tolist())
                text = text.lstrip() if prefix else text  # some tokenizers write the space
                count = int(num_tokens) - len(prefix)
                rows[int(index)] = (text, float(logprobs.sum()), count)
    records = []
    for index, (text, logprob, num_tokens) in sorted(rows.items()):
        example = source[index]
        known = references(example)
        records.append(
            CaptionRecord(
                key=example.key,
                source=source_name,
                index=index,
                caption=text,
                references=known,
                exact=bool(known) and bool(captions.exact_match([text], [known])),
                unigram_f1=captions.unigram_f1([text], [known]) if known else 0.0,
                logprob=logprob,
                num_tokens=num_tokens,
                guidance_scale=options.guidance_scales[0],
                seed=0,
                step=step,
            )
        )
    counts = collections.Counter(record.key for record in records)
    return [  # a source of several others may repeat keys
        record._replace(key=f"{record.key}#{record.index}") if counts[record.key] > 1 else record
        for record in records
    ]


def measure_records(
    records: Sequence[CaptionRecord],
    *,
    tokenizer: str = "treebank",
    java: bool | None = False,
    lexicon: Lexicon | None = None,
) -> Measured:
    """All of `measure_captions`, and exact matches and word F1, of the captions with references.

    With a lexicon also what they mention that no reference does (`measure_hallucination`). Where
    none has any: their length and vocabulary. Nothing of no records.
    """
    scored = [record for record in records if record.references] or list(records)
    if not scored:
        return Measured({}, skipped={"captions": "no captions"})
    texts = [record.caption for record in scored]
    known = [record.references for record in scored] if scored[0].references else None
    keys = [record.key for record in scored]
    parts = {"agreement": measure_captions(texts, known, keys, tokenizer=tokenizer, java=java)}
    parts["distinct"] = Measured({"distinct_ratio": captions.distinct_ratio(texts)})
    if known is not None:
        items = {
            "exact_match": captions.exact_match_items(texts, known).astype(np.float64),
            "unigram_f1": captions.unigram_f1_items(texts, known),
        }
        parts["match"] = Measured(
            metrics={name: float(values.mean()) for name, values in items.items()},
            items=items,
            keys=tuple(keys),
            intervals=intervals({name: mean_of(values) for name, values in items.items()}),
        )
        if lexicon is not None:
            parts["mentions"] = measure_hallucination(texts, known, lexicon, keys=keys)
    return join(parts)


def write_captions(path: epath.PathLike, records: Iterable[CaptionRecord]) -> None:
    """Writes the records as JSON lines, all or nothing."""
    lines = [json.dumps(record._asdict(), ensure_ascii=False) for record in records]
    write_atomic(path, "".join(line + "\n" for line in lines))
