"""The tokenizer: exact round trips, sticky end, and the same bytes from the same texts."""

import io
import pickle
from functools import cache

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from capjax.data.tokenizer import EOS_ID, NUM_FIXED, PAD_ID, Tokenizer
from capjax.errors import UserError

COLORS = ("red", "blue", "light brown", "white")
THINGS = ("cat", "dog’s hat", "face with tears of joy", "hill: snow")
TEXTS = [f"a {color} {thing} no. {n}" for color in COLORS for thing in THINGS for n in range(9)]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 330)


# U+2581 is SentencePiece's own mark of a space, and U+0000 ends its strings.
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0"))


@settings(deadline=None, max_examples=200)
@given(any_text | st.sampled_from(TEXTS))
def test_any_text_round_trips_but_for_runs_of_spaces(text):
    tokens = tokenizer().encode(text, 4 * len(text) + 8)
    assert tokens.dtype == np.int32
    assert tokenizer().decode(tokens) == " ".join(part for part in text.split(" ") if part)


@settings(deadline=None, max_examples=100)
@given(any_text, st.integers(2, 12))
def test_the_end_is_kept_and_the_rest_is_padding(text, length):
    long = tokenizer().encode(text, 4 * len(text) + 8)
    tokens = tokenizer().encode(text, length)
    assert tokens.shape == (length,)
    count = int(np.flatnonzero(long == EOS_ID)[0])
    assert tokenizer().count(text) == count + 1
    end = min(count, length - 1)
    np.testing.assert_array_equal(tokens[:end], long[:end])
    assert tokens[end] == EOS_ID
    assert (tokens[end + 1 :] == PAD_ID).all()
    assert (tokens[:end] > EOS_ID).all()


def test_a_batch_is_its_rows():
    rows = [tokenizer().encode(text, 10) for text in TEXTS[:7]]
    np.testing.assert_array_equal(tokenizer().encode_batch(TEXTS[:7], 10), rows)
    assert tokenizer().encode_batch([], 10).shape == (0, 10)


def test_decode_stops_at_the_end_and_skips_what_is_no_text():
    ids = tokenizer().encode("a red cat", 20)
    size = tokenizer().vocab_size
    noisy = [PAD_ID, *ids[:2].tolist(), PAD_ID, size, size + 7, *ids[2:].tolist(), 300, 300]
    assert tokenizer().decode(noisy) == "a red cat"
    assert tokenizer().decode([EOS_ID, *ids]) == ""
    assert tokenizer().decode([]) == ""


def test_pieces_are_learnt():
    assert NUM_FIXED < tokenizer().vocab_size <= 330
    assert tokenizer().count(TEXTS[-1]) < len(TEXTS[-1])
    # "white" is part of no other word: SentencePiece by itself would not find it.
    assert "▁white" in tokenizer().pieces("a white hill")


@settings(deadline=None, max_examples=25)
@given(st.lists(any_text, min_size=1, max_size=20))
def test_any_texts_give_a_tokenizer_or_a_clear_error(texts):
    try:
        trained = Tokenizer.train(texts, 400)
    except UserError:
        return
    for text in texts:
        line = " ".join(part for part in text.split(" ") if part)
        assert trained.decode(trained.encode(text, 4 * len(text) + 8)) == line


def test_training_is_deterministic_and_order_is_kept():
    again = Tokenizer.train(iter(TEXTS), 330)
    assert again.model_bytes == tokenizer().model_bytes
    assert again.fingerprint == tokenizer().fingerprint
    assert again == tokenizer()
    assert Tokenizer.train(TEXTS[: len(TEXTS) // 2], 330) != again


def test_it_travels_as_bytes_file_and_pickle(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer().model_bytes)
    copies = [
        Tokenizer.from_bytes(tokenizer().model_bytes),
        Tokenizer.from_file(path),
        pickle.loads(pickle.dumps(tokenizer())),
    ]
    for copy in copies:
        assert copy == tokenizer()
        np.testing.assert_array_equal(
            copy.encode("a red cat", 9), tokenizer().encode("a red cat", 9)
        )


def test_a_small_corpus_gives_fewer_pieces_than_asked():
    small = Tokenizer.train(["one"], 5000)
    assert NUM_FIXED < small.vocab_size < 300
    assert small.decode(small.encode("another", 20)) == "another"


def test_broken_unicode_is_encoded_as_question_marks():
    assert tokenizer().decode(tokenizer().encode("a \ud800 cat", 20)) == "a ? cat"


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 500, "no text"),
        (["", " \n"], 500, "no text"),
        (TEXTS, 259, "vocab_size=259: expected more than 259"),
        (TEXTS, 270, r"vocab_size=270 is too small: these captions need at least \d+"),
    ],
)
def test_impossible_training_is_a_clear_error(texts, vocab_size, message):
    with pytest.raises(UserError, match=message):
        Tokenizer.train(texts, vocab_size)


def test_the_size_an_error_asks_for_is_enough():
    with pytest.raises(UserError) as caught:
        Tokenizer.train(TEXTS, 270)
    needed = int(str(caught.value).split("at least ")[1].split()[0])
    assert Tokenizer.train(TEXTS, needed).vocab_size == needed
    with pytest.raises(UserError):
        Tokenizer.train(TEXTS, needed - 1)


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "missing.model")
    for data in (b"", b"hello, this is no model"):
        (tmp_path / "bad.model").write_bytes(data)
        with pytest.raises(UserError, match=r"bad\.model.*not a SentencePiece model"):
            Tokenizer.from_file(tmp_path / "bad.model")


def test_a_model_with_other_special_ids_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=40, minloglevel=2
    )
    with pytest.raises(UserError, match=r"ids \(-1, 2, 0\), expected \(0, 1, 2\)"):
        Tokenizer.from_bytes(model.getvalue())


def test_pieces_may_span_words():
    """Parts of set phrases become one piece, and the same text comes back."""
    texts = [f"{who}: {tone} skin tone" for who in ("cook", "pilot") for tone in ("dark", "light")]
    phrases = Tokenizer.train(texts * 5, 330, split_by_whitespace=False)
    words = Tokenizer.train(texts * 5, 330)
    assert any("skin" in piece and "tone" in piece for piece in phrases.pieces(texts[0]))
    assert not any("skin" in piece and "tone" in piece for piece in words.pieces(texts[0]))
    for text in texts:
        assert phrases.decode(phrases.encode(text, 30)) == text
