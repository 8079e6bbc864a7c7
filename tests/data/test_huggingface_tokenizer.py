"""Tokenizers of Hugging Face: the same ids as the library's own classes, and our interface."""

import pickle
import sys

import numpy as np
import pytest

from capjax.data.huggingface_tokenizer import HuggingFaceTokenizer
from capjax.data.tokenizer import Tokenizer, canonical
from capjax.errors import UserError

pytestmark = pytest.mark.usefixtures("library")
TEXTS = [
    "a photo of a cat",
    "A  Photo,\nof two dogs' hats: 12 dollars!",
    "",
    "ÉCLAIR naïve 猫 🐱 it's",
    "the dog sat on the cat that sat on the hat " * 3,
]


@pytest.fixture
def library(require_module):
    return require_module("tokenizers")


def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary as CLIP's is made: bytes, bytes that end a word, merges, and the two marks."""
    from tokenizers import pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("t", "h"),
        ("th", "e</w>"),
        ("c", "a"),
        ("ca", "t</w>"),
        ("a", "t</w>"),
        ("o", "f</w>"),
    ]
    names = [*symbols, *(f"{x}</w>" for x in symbols), *("".join(pair) for pair in merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    return {name: number for number, name in enumerate(names)}, merges


def clip_like() -> bytes:
    """CLIP's tokenizer.json over `byte_pairs`, by the tokenizers library alone."""
    vocabulary, merges = byte_pairs()
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers, processors

    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary, merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>"
        )
    )
    made.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    made.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    split = pre_tokenizers.Split(tokenizers.Regex(words), "removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    start, end = (made.token_to_id(f"<|{x}oftext|>") for x in ("start", "end"))
    made.post_processor = processors.TemplateProcessing(
        "<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)],
    )
    return made.to_str().encode()


def gemma_like() -> bytes:
    """A byte-fallback vocabulary with pad 0 and end 1, whose file adds no end."""
    import tokenizers
    from tokenizers import decoders, normalizers

    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{x:02X}>" for x in range(256))]
    names += ["</s>", "▁", *"abcdefghijklmnopqrstuvwxyz"]  # the first is HTML's
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {name: i for i, name in enumerate(names)},
            [],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.enable_padding(length=9)
    made.enable_truncation(3)
    return made.to_str().encode()


@pytest.mark.parametrize("length", [6, 77])
def test_ids_are_those_of_transformers_for_clip(length, require_module):
    transformers = require_module("transformers")
    vocabulary, merges = byte_pairs()
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    found = theirs(TEXTS, padding="max_length", truncation=True, max_length=length)
    wanted = np.array(found.input_ids)
    ends = np.argmax(wanted == theirs.eos_token_id, 1)
    beyond = np.arange(length)[None, :] > ends[:, None]
    for data in (clip_like(), theirs.backend_tokenizer.to_str().encode()):
        ours = Tokenizer.from_bytes(data)
        assert ours.eos_id == theirs.eos_token_id == ours.vocab_size - 1
        tokens = ours.encode_batch(TEXTS, length)
        # They pad with the end, we with 0: nothing after the first end is seen.
        np.testing.assert_array_equal(tokens, np.where(beyond, 0, wanted))


def test_text_comes_back():
    ours = Tokenizer.from_bytes(clip_like())
    assert ours.pieces("the cat") == ["the</w>", "cat</w>"]
    assert ours.count("the cat") == 4
    assert ours.decode(ours.encode("The cat, of THE hat!", 40)) == "the cat , of the hat !"
    other = Tokenizer.from_bytes(gemma_like())
    for text in ("a cat", "naïve 猫 🐱 ", ""):
        assert other.decode(other.encode(text, 60)) == text
    assert other.decode([70, 10**6, -1, 1, 71]) == other.decode([70])


def test_an_end_is_added_and_kept_where_the_file_does_not():
    ours = Tokenizer.from_bytes(gemma_like())
    assert ours.eos_id == 1
    tokens = ours.encode_batch(["ab", "abcdefgh", ""], 5)
    a = ours.encode("a", 2)[0]
    np.testing.assert_array_equal(
        tokens, [[a, a + 1, 1, 0, 0], [a, a + 1, a + 2, a + 3, 1], [1, 0, 0, 0, 0]]
    )
    assert tokens.dtype == np.int32


def test_it_travels_as_file_and_pickle(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(clip_like())
    ours = Tokenizer.from_file(path)
    assert isinstance(ours, HuggingFaceTokenizer)
    other = pickle.loads(pickle.dumps(ours))
    assert other == ours
    assert other.eos_id == ours.eos_id
    assert other.fingerprint == ours.fingerprint
    np.testing.assert_array_equal(other.encode_batch(TEXTS, 30), ours.encode_batch(TEXTS, 30))
    assert ours.encode("\ud800", 9)[1] == ours.encode("?", 9)[1]


def test_other_files_are_refused(tmp_path, monkeypatch):
    data = clip_like()
    with pytest.raises(UserError, match=r"not a tokenizer\.json of Hugging Face's"):
        Tokenizer.from_bytes(b'{"version": "1.0"}')
    endless = data.replace(b"<|endoftext|>", b"<|nothing|>")
    with pytest.raises(UserError, match="no end of text; expected one of the tokens <eos>"):
        Tokenizer.from_bytes(endless)
    (tmp_path / "tokenizer.json").write_bytes(data)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"tokenizer\.json': .* needs the package tokenizers"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_a_sentencepiece_model_gives_the_ids_of_transformers_for_siglip(tmp_path, require_module):
    transformers = require_module("transformers")
    ours = Tokenizer.train([canonical(text) for text in TEXTS] * 3, 330)
    (tmp_path / "spiece.model").write_bytes(ours.model_bytes)
    theirs = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"))
    for length in (8, 64):
        found = theirs(TEXTS, padding="max_length", truncation=True, max_length=length)
        tokens = ours.encode_batch([canonical(text) for text in TEXTS], length)
        # They pad with the end of text, 1, which `text_pad_id` makes of our 0.
        np.testing.assert_array_equal(np.where(tokens == 0, 1, tokens), found.input_ids)


def test_canonical_text():
    assert canonical(" It's\ta  CAT -- (really)! ") == "its a cat really"
    assert canonical("Été: “12”") == "été “12”"
    assert canonical("...") == ""
