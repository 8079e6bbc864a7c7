"""A language model with its tokenizer: the probabilities of texts, and captions chosen by them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from capjax.data.tokenizer import EOS_ID, PAD_ID, Tokenizer
from capjax.decoding.generate import LanguageGuidance
from capjax.decoding.inputs import compiled_size, pad_rows
from capjax.dims import Array, Float, Int, Params
from capjax.errors import UserError
from capjax.mesh import replicated
from capjax.models.language_model import LanguageModel

_LENGTH_STEP = 16  # texts are padded to a multiple: few sizes, few compilations
_SEPARATOR = "\n\n"  # between the captions of a prompt (Kornblith et al. 2023, section 3.3)


class TextLogprobs(NamedTuple):
    """Of T texts: log p, summed and in the mean over their tokens, in nats."""

    sum_T: np.ndarray
    mean_T: np.ndarray
    num_tokens_T: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedLanguageModel:
    """A language model, ready to use. What it reads before a text, its prompt, lies in `params`.

    Within the loop it can guide a captioner that was trained on its tokenizer (`guidance`); the
    captions of any other can be rescored (`logprobs`, then `rank`).
    """

    model: LanguageModel
    params: Params
    tokenizer: Tokenizer  # with a captioner's 0 and 1 for padding and end

    def prompted(self, captions: Sequence[str]) -> "LoadedLanguageModel":
        """The same behind these captions, two newlines after each; none: without a prompt.

        Their keys and values are computed here, once. Raises `UserError` where they are too long.
        """
        if isinstance(captions, str):
            raise UserError(f"prompt={captions!r}: expected a list of captions")
        text = "".join(f"{caption}{_SEPARATOR}" for caption in captions)
        # Two newlines are other tokens at the end of a text than before a word.
        ids = self._ids(f"{text}a")[:-1]
        tokens_P = np.array([self.model.config.start_id, *ids], np.int32)
        params = self.model.read_prompt(self.params, tokens_P)
        return dataclasses.replace(self, params=params)

    def on_mesh(self, mesh: Mesh) -> "LoadedLanguageModel":
        """The same, with its parameters and its prompt on every device of `mesh`."""
        params = jax.device_put(self.params, NamedSharding(mesh, replicated))
        return dataclasses.replace(self, params=params)

    def logprobs(
        self,
        texts: Sequence[str],
        prompt: Sequence[str] | None = None,
        *,
        include_end: bool = True,
        batch_size: int = 16,
    ) -> TextLogprobs:
        """log p(text | prompt) of each text, by the language model's own tokenizer.

        Args:
          prompt: captions before each text, instead of those given to `prompted`.
          include_end: with the probability that the text ends there, as guidance within the loop
            counts it: of a control token or a newline.

        Raises `UserError` for a text longer than the model reads.
        """
        if prompt is not None:
            return self.prompted(prompt).logprobs(
                texts, include_end=include_end, batch_size=batch_size
            )
        ids = [self._ids(text) + [EOS_ID] * include_end for text in texts]
        room = self.model.config.text_length - int(self.model.prompt(self.params).length)
        for i, row in enumerate(ids):
            if len(row) > room:
                raise UserError(
                    f"texts[{i}] has {len(row)} tokens, and the language model reads at most {room}"
                )
        found = np.zeros(len(texts))
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = max(1, *(len(ids[i]) for i in rows))
            length = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
            labels_BL = np.full((len(rows), length), PAD_ID, np.int32)
            for row, i in zip(labels_BL, rows, strict=True):
                row[: len(ids[i])] = ids[i]
            labels_BL = pad_rows(labels_BL, compiled_size(len(rows), batch_size))
            found[rows] = _sum_logprobs(self.model, self.params, labels_BL)[: len(rows)]
        num_tokens = np.array([len(row) for row in ids], np.int64)
        return TextLogprobs(found, found / np.maximum(num_tokens, 1), num_tokens)

    def guidance(
        self, tokenizer: Tokenizer, alpha: float = 1.0, beta: float = 1.0
    ) -> LanguageGuidance:
        """For the loop of a captioner with this tokenizer.

        Newlines end a caption already, in `LanguageModel.caption_logits`. Raises `UserError` unless
        the captioner was trained on this model's own tokenizer.
        """
        if tokenizer != self.tokenizer:
            raise UserError(
                f"the captioner's {tokenizer} is not the language model's {self.tokenizer}, and "
                "only equal ids can be weighed against each other: train a captioner with "
                "data.tokenizer.path set to the language model's, or write several captions an "
                "image (num_captions) and rescore them"
            )
        return LanguageGuidance(self.model, self.params, alpha, beta)

    def _ids(self, text: str) -> list[int]:
        num_ids = self.tokenizer.count(text) - 1
        return self.tokenizer.encode(text, num_ids + 1)[:num_ids].tolist()


def rank(
    language_logprob_S: Sequence[float] | np.ndarray,
    logprob_S: Sequence[float] | np.ndarray,
    prior_S: Sequence[float] | np.ndarray | float = 0.0,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(order, best first; scores) of captions of one image.

    The score is log p_LM(x) + alpha * log p(x | image) - beta * log p(x), the last the captioner's
    own without image: Kornblith et al. 2023, for whole captions instead of tokens.
    """
    scores_S = (
        np.asarray(language_logprob_S, np.float64)
        + alpha * np.asarray(logprob_S, np.float64)
        - beta * np.asarray(prior_S, np.float64)
    )
    return np.argsort(-scores_S, kind="stable"), scores_S


@functools.partial(jax.jit, static_argnums=0)
def _sum_logprobs(
    model: LanguageModel, params: Params, labels_BL: Int[Array, "B L"]
) -> Float[Array, " B"]:
    """log p of each row's labels: ids, perhaps the end, padding."""
    first_B1 = jnp.full((len(labels_BL), 1), model.prompt(params).last)
    inputs_BL = jnp.concatenate([first_B1, labels_BL[:, :-1]], axis=1)
    logits_BLV = model.logits(params, model.hidden(params, inputs_BL))
    label_BL = jnp.take_along_axis(logits_BLV, labels_BL[:, :, None], axis=2)[:, :, 0]
    if model.config.end_ids:
        label_BL = jnp.where(labels_BL == EOS_ID, model.end_logit(logits_BLV), label_BL)
    logprob_BL = label_BL - jax.nn.logsumexp(logits_BLV, axis=-1)
    return jnp.sum(jnp.where(labels_BL == PAD_ID, 0.0, logprob_BL), axis=1)
