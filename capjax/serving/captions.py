"""One batch of requests on the device: images and prefixes in, caption records out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from capjax.decoding.loaded_model import LoadedModel
from capjax.decoding.options import DecodingOptions
from capjax.serving.parameters import Parameters

Record = dict[str, Any]


class Structure(NamedTuple):
    """What of the options is compiled; all else are numbers."""

    method: str
    num_rows: int  # beams or draws an image
    max_length: int
    has_top_p: bool
    is_guided: bool

    def __str__(self) -> str:
        rows = {"beam": f"num_beams={self.num_rows}", "sample": f"num_captions={self.num_rows}"}
        words = [
            f"{self.method} {rows.get(self.method, '')}".strip(),
            f"max_length={self.max_length}",
            *(["top_p"] if self.has_top_p else []),
            *(["guided"] if self.is_guided else []),
        ]
        return " ".join(words)


def structure(options: DecodingOptions) -> Structure:
    """The structure of options whose `max_length` is filled in."""
    return Structure(
        method=options.method,
        num_rows=options.num_beams if options.method == "beam" else options.num_captions,
        max_length=options.max_length or 0,
        has_top_p=options.top_p < 1,
        is_guided=options.is_guided,
    )


def batch_key(parameters: Parameters) -> tuple[DecodingOptions, int]:
    """Requests with the same one may share a batch: the options, and the seed where it matters."""
    draws = parameters.options.method == "sample"
    return parameters.options, parameters.seed if draws else 0


def caption_batch(
    captioner: LoadedModel,
    images: Sequence[np.ndarray],
    parameters: Sequence[Parameters],
    batch_size: int,
) -> list[Record]:
    """One record an image, as `LoadedModel.caption_records([image], ...)` makes it.

    Args:
      images: uint8 [size, size, 3], preprocessed.
      parameters: of each, with the same `batch_key`.
      batch_size: rows are padded to a power of two, at most this many.
    """
    options, seed = batch_key(parameters[0])
    # Each is the first image of its own request, and its prefix, also an empty one, is forced: one
    # program serves all.
    starts = [{"key": one.key, "index": 0, "prefix": one.prefix} for one in parameters]
    rows = zip(starts, images, strict=True)
    made = captioner.stream(rows, options, seed=seed, batch_size=batch_size, prefix="")
    return [_record(record, one) for record, one in zip(made, parameters, strict=True)]


def _record(record: Record, parameters: Parameters) -> Record:
    answer = {name: x for name, x in record.items() if name not in ("index", "prefix")}
    return {**answer, "seed": parameters.seed}
