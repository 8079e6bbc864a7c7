"""One batch of requests on the device: images and prefixes in, caption records out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from capjax.data.tokenizer import PAD_ID
from capjax.decoding.generate import FINISH_REASONS, Generated, generate
from capjax.decoding.inputs import compiled_size, pad_rows
from capjax.decoding.load import LoadedModel
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
    size = compiled_size(len(images), batch_size)
    # Prefixes are forced in every batch, also where there are none: one program serves both.
    forced_BL = np.full((len(images), options.max_length or 0), PAD_ID, np.int32)
    for row, one in zip(forced_BL, parameters, strict=True):
        row[: len(one.prefix_ids)] = one.prefix_ids
    made = generate(
        captioner.model,
        captioner.params,
        jnp.asarray(pad_rows(np.stack(images), size)),
        options,
        key=jax.random.key(seed),
        index_B=jnp.zeros(size, jnp.int32),  # each is the first image of its own request
        mask_B=jnp.asarray(np.arange(size) < len(images)),
        forced_BL=jnp.asarray(pad_rows(forced_BL, size)),
    )
    made = jax.device_get(made)
    return [_record(captioner, made, row, one) for row, one in enumerate(parameters)]


def _record(captioner: LoadedModel, made: Generated, row: int, parameters: Parameters) -> Record:
    captions = [
        {
            "caption": captioner.tokenizer.decode(made.tokens_BSL[row, s].tolist()),
            "logprob": float(made.logprobs_BSL[row, s].sum()),
            "num_tokens": int(made.num_tokens_BS[row, s]),
            "finish": FINISH_REASONS[made.finish_BS[row, s]],
        }
        for s in range(made.finish_BS.shape[1])
        if FINISH_REASONS[made.finish_BS[row, s]] != "absent"
    ]
    return {
        "key": parameters.key,
        **captions[0],
        "guidance_scale": parameters.options.guidance_scale,
        "seed": parameters.seed,
        **({"captions": captions} if parameters.options.num_captions > 1 else {}),
    }


def has_null_image(captioner: LoadedModel) -> bool:
    """Whether the model learnt to write without an image, which guidance leads away from."""
    objectives = captioner.config.get("objective", {})
    return any(
        fields.get("weight", 0) > 0 and fields.get("image_dropout", 0) > 0
        for fields in objectives.values()
        if isinstance(fields, dict)
    )
