"""The tokenizer: a SentencePiece unigram model with byte fallback, held as its bytes.

Ids: 0 pad, 1 end of text, 2 unknown (never produced: byte fallback spells any text), then the
bytes and the pieces. Text goes in as it is but for runs of spaces, which become one; lower-casing
is the caption's transform, not the tokenizer's.
"""

import hashlib
import io
import os
import re
import string
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import SupportsInt

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from capjax.errors import UserError

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
NUM_FIXED = 3 + 256  # pad, end, unknown, and one piece for each byte
_SPACE = "\u2581"  # SentencePiece's mark of a space
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MAX_PIECE = 16  # characters
_MAX_SEEDS = 2_000_000


class Tokenizer:
    """Text to ids and back. Picklable, and safe to use from several threads."""

    eos_id = EOS_ID

    def __init__(self, model_bytes: bytes) -> None:
        """`model_bytes`: a serialized SentencePiece model. Raises `UserError` if it is not ours."""
        self.model_bytes = model_bytes
        self._processor = _load(model_bytes)
        self.vocab_size: int = self._processor.get_piece_size()

    @classmethod
    def from_bytes(cls, model_bytes: bytes) -> "Tokenizer":
        """From a serialized SentencePiece model, or a `tokenizer.json` of Hugging Face's."""
        if not model_bytes.startswith(b"{"):
            return cls(model_bytes)
        from capjax.data.huggingface_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer(model_bytes)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """From a `.model` file or a `tokenizer.json`.

        Raises `UserError` where it is missing or no tokenizer.
        """
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except OSError as error:
            raise UserError(
                f"tokenizer {os.fspath(path)!r} cannot be read ({error.strerror}); "
                "make one with `capjax data tokenizer`"
            ) from error
        except UserError as error:
            raise UserError(f"tokenizer {os.fspath(path)!r}: {error}") from error

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, split_by_whitespace: bool = True
    ) -> "Tokenizer":
        """Trains on `texts`: at most `vocab_size` pieces, fewer where the texts hold no more.

        Without `split_by_whitespace` a piece may be a phrase ("dark skin tone"): shorter sequences
        where captions are made of set phrases.

        The same texts in the same order give the same bytes. Raises `UserError` for no text, and
        for a `vocab_size` that does not hold the fixed pieces and the characters of the texts.
        """
        return cls(_train(texts, vocab_size, split_by_whitespace))

    @property
    def fingerprint(self) -> str:
        """sha256 of the model, in hex."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text, for people to read."""
        return self._processor.encode(valid(text), out_type=str)

    def count(self, text: str) -> int:
        """The ids of a text, with its end and without truncation."""
        return len(self._processor.encode(valid(text))) + 1

    def encode(self, text: str, length: int) -> np.ndarray:
        """Text -> int32 [length]: ids, EOS, pads. EOS is kept when the text is cut."""
        return self.encode_batch([text], length)[0]

    def encode_batch(self, texts: Sequence[str], length: int) -> np.ndarray:
        """B texts -> int32 [B, length], each as `encode`."""
        tokens_BL = np.full((len(texts), length), PAD_ID, np.int32)
        for row, text in zip(tokens_BL, texts, strict=True):
            ids = self._processor.encode(valid(text))[: length - 1]
            row[: len(ids)] = ids
            row[len(ids)] = EOS_ID
        return tokens_BL

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Ids -> text, up to the first EOS; pads and ids beyond the vocabulary are skipped."""
        kept = []
        for token in map(int, ids):
            if token == EOS_ID:
                break
            if PAD_ID < token < self.vocab_size:
                kept.append(token)
        return self._processor.decode(kept)

    def __getstate__(self) -> bytes:
        return self.model_bytes

    def __setstate__(self, model_bytes: bytes) -> None:
        self.__init__(model_bytes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.model_bytes == other.model_bytes

    def __hash__(self) -> int:
        return hash(self.model_bytes)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:8]})"


def canonical(text: str) -> str:
    """Lower case, no ASCII punctuation, one space between words and none around them.

    SigLIP's texts are prepared so for zero-shot evaluation, in training their case alone
    (big_vision's `prompt_engineering.canonicalize_text`); transformers' `SiglipTokenizer` does all
    of it to every text.
    """
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def valid(text: str) -> str:
    """Text that UTF-8 can hold: a lone surrogate (broken JSON) becomes a question mark."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def _load(model_bytes: bytes) -> sentencepiece.SentencePieceProcessor:
    if not model_bytes:
        raise UserError("not a SentencePiece model (empty)")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        ids = (processor.pad_id(), processor.eos_id(), processor.unk_id())
    except Exception as error:  # the library raises what protobuf and it please
        raise UserError(f"not a SentencePiece model ({len(model_bytes)} bytes)") from error
    if ids != (PAD_ID, EOS_ID, UNK_ID):
        raise UserError(
            f"pad, end and unknown have the ids {ids}, expected {(PAD_ID, EOS_ID, UNK_ID)}; "
            "train one with `capjax data tokenizer`"
        )
    return processor


def _train(texts: Iterable[str], vocab_size: int, split_by_whitespace: bool) -> bytes:
    lines = [line for text in texts for line in valid(text).replace("\0", " ").splitlines()]
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError("no text to train a tokenizer on: the captions are empty")
    if vocab_size <= NUM_FIXED:
        raise UserError(
            f"vocab_size={vocab_size}: expected more than {NUM_FIXED} "
            "(pad, end, unknown and 256 bytes)"
        )
    model = io.BytesIO()
    seeds = _seed_pieces(lines) if split_by_whitespace else []
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as file:
        file.writelines(f"{piece}\t{count}\n" for piece, count in seeds)
        file.flush()
        _run_trainer(
            lines,
            model,
            vocab_size=vocab_size,
            split_by_whitespace=split_by_whitespace,
            seed_sentencepieces_file=file.name if seeds else "",
        )
    proto = sentencepiece_model_pb2.ModelProto()  # pyrefly: ignore[missing-attribute]
    proto.ParseFromString(model.getvalue())
    proto.trainer_spec.ClearField("seed_sentencepieces_file")  # its name is another each time
    return proto.SerializeToString(deterministic=True)


def _seed_pieces(lines: list[str]) -> list[tuple[str, int]]:
    """What the trainer shall choose from: every repeated part of a word, with its count.

    SentencePiece looks for repeated parts among the *distinct* words, so a word that no other one
    contains, however common, would be cut up. In a large corpus that is rare: nothing is given
    there, and SentencePiece finds its own.
    """
    words = Counter(word for line in lines for word in line.split() if _SPACE not in word)
    counts: Counter[str] = Counter()
    for word, count in words.items():
        marked = _SPACE + word
        for start in range(len(marked)):
            for end in range(start + 1, min(len(marked), start + _MAX_PIECE) + 1):
                counts[marked[start:end]] += count
        if len(counts) > _MAX_SEEDS:
            return []
    # Longest reach first, and a fixed order among equals: the same texts give the same model.
    repeated = [(piece, count) for piece, count in counts.items() if count > 1]
    return sorted(repeated, key=lambda pair: (-pair[1] * len(pair[0]), pair[0]))


def _run_trainer(lines: list[str], model: io.BytesIO, *, vocab_size: int, **settings) -> None:
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a small corpus gives fewer pieces instead of an error
            byte_fallback=True,
            character_coverage=0.9999,
            # What is decoded is then what was written: captions are compared as strings.
            normalization_rule_name="identity",
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            num_threads=1,  # several threads sum in another order each time
            max_sentence_length=1 << 20,
            max_sentencepiece_length=_MAX_PIECE,
            minloglevel=2,
            **settings,
        )
    except (RuntimeError, OSError) as error:
        # "Vocabulary size is smaller than required_chars. 300 vs 412 ..."
        needed = re.search(r"required_chars\D*\d+ vs (\d+)", str(error))
        if needed is None:
            raise UserError(f"no tokenizer with vocab_size={vocab_size}: {error}") from error
        raise UserError(
            f"vocab_size={vocab_size} is too small: these captions need at least {needed[1]} "
            f"(their characters and {NUM_FIXED} fixed pieces)"
        ) from error
