"""The frozen towers of rewards: captions as they read them, and what they make of them.

Letters beyond `capjax.dims`: J captions of an image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.dims import Array, Float, Int
from capjax.models.coca import CoCa
from capjax.models.two_towers import TwoTowers
from capjax.objectives.parallel_draw import as_rows


class RewardTowers(NamedTuple):
    """Towers, and how they come by the captions.

    `prompt`: ids that captions begin with. `reads_tokens`: their tokenizer is the captioner's, so
    that ids need not become text and ids again (a sampled caption may be cut into other pieces than
    the tokenizer would cut it into; that is what they then read).
    """

    embedder: TwoTowers | CoCa
    prompt: tuple[int, ...] = ()
    reads_tokens: bool = True

    def embed(self, params: Any, tokens_BJL: Int[Array, "B J L"]) -> Float[Array, "B J D"]:
        """Embeddings of length 1 of texts as these towers read them; without gradient."""
        B, J, L = tokens_BJL.shape
        text_TD = self.embedder.embed_text(params, as_rows(tokens_BJL, (B * J, L)))
        return lax.stop_gradient(as_rows(text_TD, (B, J, text_TD.shape[-1])))

    def features(self, params: Any, tokens_BJL: Int[Array, "B J L"]) -> Float[Array, "B J D"]:
        """What the text tower makes of them before its projection, float32; without gradient."""
        B, J, L = tokens_BJL.shape
        feature_TD = self.embedder.text_feature(params, as_rows(tokens_BJL, (B * J, L)))
        feature_BJD = as_rows(feature_TD.astype(jnp.float32), (B, J, feature_TD.shape[-1]))
        return lax.stop_gradient(feature_BJD)


def as_texts(
    tokens_BJL: Int[Array, "B J L"], length: int, prompt: Sequence[int] = ()
) -> Int[Array, "B J T"]:
    """Sampled captions as the tokenizer writes texts: `prompt`, ids, the end, PAD; T = `length`.

    What is too long is cut, and ends at the last position; a caption that was cut off while it was
    sampled ends behind its last token.
    """
    is_word_BJL = tokens_BJL > EOS_ID
    ids_P = jnp.array(prompt, tokens_BJL.dtype)
    front_BJP = jnp.zeros_like(tokens_BJL[:, :, :1]) + ids_P[None, None]
    words_BJT = jnp.concatenate([front_BJP, jnp.where(is_word_BJL, tokens_BJL, PAD_ID)], 2)
    words_BJT = jnp.pad(words_BJT, ((0, 0), (0, 0), (0, length)))[:, :, :length]
    count_BJ1 = jnp.sum(is_word_BJL, 2, keepdims=True) + len(prompt)
    end_BJ1 = jnp.minimum(count_BJ1, length - 1)
    place_T = jnp.arange(length)[None, None]
    return jnp.where(place_T < end_BJ1, words_BJT, jnp.where(place_T == end_BJ1, EOS_ID, PAD_ID))
