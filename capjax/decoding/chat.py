"""A language model on this machine that answers the requests of a chat endpoint."""

import functools
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capjax.data.boost_endpoint import Reply, RequestFailed
from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.decoding.rescoring import LoadedLanguageModel
from capjax.dims import Array, Float, Int, Params, PRNGKeyArray
from capjax.errors import UserError
from capjax.models.language_model import LanguageModel

_MAX_TOKENS = 256
_TURN_END = "<|im_end|>"  # of ChatML; in SmolLM2's vocabulary a turn begins with token 1


class LocalChat:
    """A `Chat` that answers one request after another.

    Of a request `messages`, `max_tokens`, `temperature` (0: the likeliest token) and `seed` count.
    An answer ends at a newline too, as captions do. SmolLM2's models are asked in ChatML, others by
    the messages' text alone.
    """

    def __init__(self, language: LoadedLanguageModel) -> None:
        self._language, self._lock = language, threading.Lock()
        self._is_stopped = False
        self._is_chatml = len(self._ids(_TURN_END)) == 1

    def stop(self) -> None:
        """Answers no more."""
        self._is_stopped = True

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """Raises `RequestFailed` for a request longer than the model reads."""
        ids = self._prompt(body["messages"])
        length = int(body.get("max_tokens", _MAX_TOKENS))
        model, params = self._language.model, self._language.params
        with self._lock:
            if self._is_stopped:
                raise RequestFailed("stopped")
            try:
                params = model.read_prompt(params, np.array(ids, np.int32))
                tokens_L = _write(
                    model,
                    params,
                    jnp.float32(body.get("temperature", 0.0)),
                    jax.random.key(int(body.get("seed", 0))),
                    length=length,
                )
            except UserError as error:
                raise RequestFailed(str(error)) from error
        tokens = np.asarray(tokens_L)
        num_tokens = int((tokens != PAD_ID).sum())
        finish = "stop" if EOS_ID in tokens else "length"
        return Reply(self._language.tokenizer.decode(tokens), finish, len(ids), num_tokens)

    def _prompt(self, messages: list[Mapping[str, str]]) -> list[int]:
        """The ids of the messages, up to where the answer begins."""
        if not self._is_chatml:
            text = "\n\n".join(message["content"] for message in messages)
            return [self._language.model.config.start_id, *self._ids(f"{text}\n\n")]
        ids: list[int] = []
        for message in messages:
            ids += [EOS_ID, *self._ids(f"{message['role']}\n{message['content']}{_TURN_END}\n")]
        return [*ids, EOS_ID, *self._ids("assistant\n")]

    def _ids(self, text: str) -> list[int]:
        tokenizer = self._language.tokenizer
        num_ids = tokenizer.count(text) - 1
        return tokenizer.encode(text, num_ids + 1)[:num_ids].tolist()


@functools.partial(jax.jit, static_argnums=0, static_argnames="length")
def _write(
    model: LanguageModel,
    params: Params,
    temperature: Float[Array, ""],
    key: PRNGKeyArray,
    *,
    length: int,
) -> Int[Array, " L"]:
    """Up to `length` ids behind the prompt in `params`: the end is among them, then padding."""
    step, cache = model.start_decoding(params, batch=1, length=length)

    def advance(carry):
        tokens_L, index, last, cache = carry
        logits_BSV, _, cache = step(last[None, None], index, cache)
        logits_V = logits_BSV[0, 0]
        noise_V = jax.random.gumbel(jax.random.fold_in(key, index), logits_V.shape)
        last = jnp.argmax(logits_V + temperature * noise_V).astype(jnp.int32)
        return tokens_L.at[index].set(last), index + 1, last, cache

    def goes_on(carry):
        _, index, last, _ = carry
        return (index < length) & ((index == 0) | (last != EOS_ID))

    start = (jnp.full(length, PAD_ID, jnp.int32), jnp.int32(0), jnp.int32(PAD_ID), cache)
    return jax.lax.while_loop(goes_on, advance, start)[0]
