"""What a captioner says of one split: its captions and their agreement with the references."""

import json
from collections.abc import Callable, Iterable
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
from capjax.dims import Params
from capjax.evaluation import captions
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
) -> tuple[dict[str, float], list[CaptionRecord]]:
    """Greedy captions of every unmasked row of `batches`, and their metrics.

    Args:
      batches: this process's rows, as `data.pipeline.eval_batches` yields them.
      references: the reference captions of an example; without any it is not scored.
      step: of the parameters, for the records.

    Returns `caption_metrics` of all rows, and the records in the order of the rows. Every process
    returns the same.
    """
    rows: dict[int, tuple[str, float, int]] = {}
    for batch in batches:
        placed = place_batch(mesh, {name: batch[name] for name in ("image", "index", "mask")})
        with jax.set_mesh(mesh):
            made = generate(
                model,
                params,
                placed["image"],
                index_B=placed["index"],
                mask_B=placed["mask"],
            )
        first = (made.tokens_BSL[:, 0], made.logprobs_BSL[:, 0], made.num_tokens_BS[:, 0])
        gathered = multihost_utils.process_allgather(
            (*first, placed["index"], placed["mask"]), tiled=True
        )
        for tokens, logprobs, num_tokens, index, is_row in zip(*gathered, strict=True):
            if is_row:
                text = tokenizer.decode(tokens.tolist())
                rows[int(index)] = (text, float(logprobs.sum()), int(num_tokens))
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
                guidance_scale=1.0,
                seed=0,
                step=step,
            )
        )
    scored = [record for record in records if record.references]
    if not scored:
        return {}, records
    metrics = captions.caption_metrics(
        [record.caption for record in scored], [record.references for record in scored]
    )
    return metrics, records


def write_captions(path: epath.PathLike, records: Iterable[CaptionRecord]) -> None:
    """Writes the records as JSON lines, all or nothing."""
    lines = [json.dumps(record._asdict(), ensure_ascii=False) for record in records]
    write_atomic(path, "".join(line + "\n" for line in lines))
