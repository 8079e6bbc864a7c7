"""Captions of any number of images as they are read: a batch on the device, the next one read."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from capjax.data.decode import ImageError
from capjax.data.tokenizer import PAD_ID
from capjax.decoding.generate import (
    FINISH_REASONS,
    NOT_BY_ROWS,
    Generated,
    LanguageGuidance,
    check_options,
    generate,
)
from capjax.decoding.options import DecodingOptions
from capjax.decoding.processors import pad_sequences
from capjax.dims import Array
from capjax.errors import UserError

if TYPE_CHECKING:
    from capjax.decoding.loaded_model import LoadedModel

MAX_SEED = 2**32 - 1

Record = dict[str, Any]
Row = tuple[Record, np.ndarray | ImageError]  # the start of a record, and its pixels or why not


@dataclasses.dataclass(frozen=True)
class CaptionStream:
    """What is asked of every image; the arguments are those of `LoadedModel.stream`."""

    captioner: "LoadedModel"
    options: DecodingOptions
    seed: int
    batch_size: int
    prefix: str | None
    contrast: np.ndarray | None  # pixels
    language: LanguageGuidance | None
    all_full: bool

    def __post_init__(self):
        check_options(self.captioner.model, self.options)
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: expected at least 1")
        if self.options.is_by_rows and not (self.prefix is self.contrast is self.language is None):
            raise UserError(NOT_BY_ROWS)
        if self.options.num_slots >= self.batch_size:
            raise UserError(
                f"num_slots={self.options.num_slots} with batch_size={self.batch_size}: every "
                "image has a slot already; set a larger batch_size, 4 times num_slots, say"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed={self.seed}: expected 0 to {MAX_SEED}")
        if self.prefix and (count := len(self.captioner.token_ids(self.prefix))) >= self.max_length:
            raise UserError(
                f"prefix={self.prefix!r}: its {count} tokens leave no room in max_length="
                f"{self.max_length}; shorten it"
            )

    @property
    def max_length(self) -> int:
        """Tokens of a caption."""
        return check_options(self.captioner.model, self.options)

    def records(self, rows: Iterable[Row]) -> Iterator[Record]:
        """The completed records, in order."""
        under_way = None
        checked = (self._with_prefix(row) for row in rows)
        for chunk, start, size in self.captioner.chunks(checked, self.batch_size, self.all_full):
            made = self._start_batch(chunk, start, size)
            if under_way is not None:
                yield from self._completed(*under_way)
            under_way = (chunk, made)
        if under_way is not None:
            yield from self._completed(*under_way)

    def _with_prefix(self, row: Row) -> tuple[Record, np.ndarray | ImageError, list[int]]:
        """The row, and the ids of its prefix."""
        about, pixels = row
        if self.prefix is None:
            return about, pixels, []
        text = about.get("prefix", self.prefix)
        ids = self.captioner.token_ids(text) if text else []
        if len(ids) >= self.max_length:
            reason = f"{len(ids)} tokens leave no room in max_length={self.max_length}"
            return about, ImageError("prefix too long", reason), []
        return about, pixels, ids

    def _start_batch(self, chunk: list, start: int, size: int) -> Generated | None:
        """Sends a batch to the device; None where no image of it could be read."""
        pixels = [image for _, image, _ in chunk]
        mask = np.array([isinstance(image, np.ndarray) for image in pixels])
        if not mask.any():
            return None
        blank = np.zeros_like(pixels[int(mask.argmax())])
        images = np.stack([image if ok else blank for image, ok in zip(pixels, mask, strict=True)])
        places = [about.get("index", row) for row, (about, _, _) in enumerate(chunk, start)]
        rows = {"inputs": images, "index_B": np.array(places, np.int32), "mask_B": mask}
        if self.prefix is not None:
            rows["forced_BL"] = np.full((len(chunk), self.max_length), PAD_ID, np.int32)
            for row, (_, _, ids) in zip(rows["forced_BL"], chunk, strict=True):
                row[: len(ids)] = ids
        if self.contrast is not None:
            rows["contrast"] = np.broadcast_to(self.contrast, images.shape)
        run = functools.partial(
            generate,
            self.captioner.model,
            self.captioner.params,
            options=self.options,
            key=jax.random.key(self.seed),
            banned_MW=self._sequences(self.options.banned),
            stop_MW=self._sequences(self.options.stop),
            language=self.language,
        )
        return self.captioner.on_device(lambda batch: run(**batch), rows, size)

    def _sequences(self, texts: Iterable[str]) -> Array | None:
        """int32 [M, W]: the ids of texts as `generate` takes them; None of none."""
        sequences = {ids: None for text in texts for ids in self._spellings(text)}
        padded = pad_sequences(list(map(list, sequences)))
        return None if padded is None else jnp.asarray(padded)

    def _spellings(self, text: str) -> list[tuple[int, ...]]:
        """The ids of a text at the beginning of a caption and, as some tokenizers cut it otherwise
        there, behind a word."""
        start = self.captioner.token_ids("")  # what a tokenizer puts before every text
        alone, word = self.captioner.token_ids(text), self.captioner.token_ids("a")
        behind = self.captioner.token_ids(f"a {text}")
        found = [alone[len(start) :]]
        if behind[: len(word)] == word:
            found.append(behind[len(word) :])
        if not all(found):
            raise UserError(f"banned or stop: {text!r} has no token; name a text that is not blank")
        return list(map(tuple, found))

    def _completed(self, chunk: list, made: Generated | None) -> Iterator[Record]:
        made = jax.device_get(made)
        for row, (about, pixels, _) in enumerate(chunk):
            if isinstance(pixels, ImageError):
                yield {**about, "error": str(pixels)}
            elif made is not None:
                captions = captions_of(made, row, self.captioner.tokenizer)
                yield {
                    **about,
                    **captions[0],
                    "guidance_scale": self.options.guidance_scale,
                    "seed": self.seed,
                    **({"captions": captions} if self.options.num_captions > 1 else {}),
                }


def captions_of(made: Generated, row: int, tokenizer) -> list[Record]:
    """What was written of one image; beams that found nothing are left out."""
    return [
        {
            "caption": tokenizer.decode(made.tokens_BSL[row, s].tolist()),
            "logprob": float(made.logprobs_BSL[row, s].sum()),
            "num_tokens": int(made.num_tokens_BS[row, s]),
            "finish": FINISH_REASONS[made.finish_BS[row, s]],
        }
        for s in range(made.finish_BS.shape[1])
        if FINISH_REASONS[made.finish_BS[row, s]] != "absent"
    ]
