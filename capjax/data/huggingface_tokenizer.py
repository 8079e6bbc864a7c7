"""A tokenizer of Hugging Face's `tokenizers`, as CLIP and SigLIP 2 have, held as its JSON."""

import importlib
from collections.abc import Iterable, Sequence
from typing import SupportsInt

import numpy as np

from capjax.data.tokenizer import PAD_ID, Tokenizer, valid
from capjax.errors import UserError

# The first that there is. Gemma's vocabulary has "</s>" too, of HTML: it must come last.
_ENDS = ("<eos>", "<|endoftext|>", "</s>")


class HuggingFaceTokenizer(Tokenizer):
    """Text to ids and back by a `tokenizer.json`; `Tokenizer.from_file` makes one of it.

    What the file puts before a text stays; the end of text, `eos_id`, is there even where the file
    adds none and where the text is cut. Padding is 0, whatever the file says: a text encoder with
    causal attention does not see it, and another has `text_pad_id` for what it reads in its place.
    Captioning needs `eos_id` 1 and a 0 that means nothing else: SigLIP 2's is so, CLIP's is not.
    """

    def __init__(self, model_bytes: bytes) -> None:
        """`model_bytes`: of a `tokenizer.json`. Raises `UserError` if it is none."""
        self.model_bytes = model_bytes
        self._backend = _load(model_bytes)
        self.vocab_size: int = self._backend.get_vocab_size()
        ends = [self._backend.token_to_id(name) for name in _ENDS]
        found = [token for token in ends if token is not None]
        if not found:
            raise UserError(f"no end of text; expected one of the tokens {', '.join(_ENDS)}")
        self.eos_id: int = found[0]

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text, for people to read."""
        return self._backend.encode(valid(text), add_special_tokens=False).tokens

    def count(self, text: str) -> int:
        """The ids of a text, with its end and without truncation."""
        return len(self._ids(text)) + 1

    def encode_batch(self, texts: Sequence[str], length: int) -> np.ndarray:
        """B texts -> int32 [B, length], each as `encode`."""
        tokens_BL = np.full((len(texts), length), PAD_ID, np.int32)
        for row, text in zip(tokens_BL, texts, strict=True):
            ids = self._ids(text)[: length - 1]
            row[: len(ids)] = ids
            row[len(ids)] = self.eos_id
        return tokens_BL

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Ids -> text, up to the first end; special tokens and unknown ids are skipped."""
        kept = []
        for token in map(int, ids):
            if token == self.eos_id:
                break
            if 0 <= token < self.vocab_size:
                kept.append(token)
        text = self._backend.decode(kept)
        # The library leaves the mark of a word's end where bytes are decoded too.
        mark = getattr(self._backend.model, "end_of_word_suffix", None)
        return text.replace(mark, " ").strip() if mark else text

    def _ids(self, text: str) -> list[int]:
        """Without the end."""
        ids = self._backend.encode(valid(text)).ids
        return ids[:-1] if ids and ids[-1] == self.eos_id else ids


def _load(model_bytes: bytes):
    try:
        library = importlib.import_module("tokenizers")
    except ImportError as error:
        raise UserError(
            "a tokenizer.json needs the package tokenizers: pip install 'capjax[huggingface]'"
        ) from error
    try:
        found = library.Tokenizer.from_str(model_bytes.decode())
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"not a tokenizer.json of Hugging Face's ({error})") from error
    found.no_truncation()
    found.no_padding()
    return found
