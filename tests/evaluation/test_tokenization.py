"""The Java-free tokenizer against what the reference program gave, and against it where it runs."""

import pytest

from capjax.errors import UserError
from capjax.evaluation import java, tokenization

# Texts, and what the PTB tokenizer of CoreNLP 3.4.1 gives without its punctuation.
PAIRS = {
    "A dog's bone, on the mat.": "a dog 's bone on the mat",
    "don't can't cannot gonna wanna gimme": "do n't ca n't can not gon na wan na gim me",
    "he'll they've i'm we'd should've wouldn't": "he 'll they 've i 'm we 'd should 've would n't",
    "the boys' o'clock rock'n'roll 'em '90s": "the boys o'clock rock 'n' roll 'em '90s",
    "\"quoted\" 'single' ``tick''": "quoted single tick",
    "(brown) [big] {red} <unk>": "-lrb- brown -rrb- -lsb- big -rsb- -lcb- red -rcb- <unk>",
    "wait.. no.... ok -- yes --- em—dash": "wait no ok yes em dash",
    "?! !! ?? !? , ; :": "?! !! ?? !?",
    "$3.50 50% #1 #tag 1,234.56 12:30pm 5ft": "$ 3.50 50 % # 1 #tag 1,234.56 12:30 pm 5ft",
    "U.S. a.m. Mr. Smith at Washington St.": "u.s. a.m. mr. smith at washington st.",
    "a cat no. the end. no. 5": "a cat no the end no. 5",
    "black&white t-shirt and/or half-eaten 24/7": "black & white t-shirt and/or half-eaten 24/7",
    "http://a.b/c. www.site.com, foo@bar.com": "http://a.b/c www.site.com foo@bar.com",
    "it’s “smart” … café 日本語 😀 ♥": "it 's smart café 日本語 ♥",
    "1½ cups £5 5¢ 20°c": "1 1/2 cups # 5 5 cents 20 ° c",
    "smile :) and ;-) or :D": "smile :-rrb- and ;--rrb- or :d",
    "Tom &amp; Jerry": "tom & jerry",
    "": "",
}
BREAKS = [
    "\r",
    "\n",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\x9f",
    "\u2028",
    "\u2029",
    "\x00",
    "\ud800",
    "\t",
]


@pytest.fixture
def programs(require_module, require_package):
    """The Java programs of the extra `eval`."""
    require_module("pycocoevalcap.cider.cider", "eval")
    require_package("default-jre-headless", "java")


@pytest.mark.parametrize(("text", "tokens"), PAIRS.items())
def test_as_the_reference_without_java(text, tokens):
    assert tokenization.treebank(text) == tokens


def test_the_reference_itself_and_how_far_the_other_agrees(programs, fakecap):
    assert tokenization.tokenize(list(PAIRS), "ptb") == list(PAIRS.values())
    texts = [text for item in fakecap["items"] for text in (item["cand"], *item["refs"])]
    for pieces, whole in ((" n't", "n't"), (" '", "'"), (" and ", ", and "), (" on ", ' "on" ')):
        texts = [text.replace(pieces, whole) for text in texts]
    texts = [text.capitalize() + "." for text in texts]
    ptb = tokenization.tokenize(texts, "ptb")
    same = [tokenization.treebank(text) == tokens for text, tokens in zip(texts, ptb, strict=True)]
    assert sum(same) / len(same) >= 0.9985


@pytest.mark.parametrize("tokenizer", ["ptb", "treebank", "none"])
def test_no_character_of_a_caption_shifts_another(tokenizer, request):
    if tokenizer == "ptb":
        request.getfixturevalue("programs")
    captions = [f"first{mark}half number {n}" for n, mark in enumerate(BREAKS)]
    found = tokenization.tokenize(["", *captions, "\n", "the last"], tokenizer)
    expected = [f"first half number {n}" for n in range(len(BREAKS))]
    assert found == ["", *expected, "", "the last"]


def test_a_missing_program_is_said(monkeypatch):
    monkeypatch.setattr(java, "package", lambda: None)
    assert "capjax[eval]" in java.why_missing()
    assert tokenization.choose("auto") == "treebank"
    with pytest.raises(UserError, match=r"pip install 'capjax\[eval\]'.*treebank"):
        tokenization.tokenize(["a"], "ptb")
    with pytest.raises(ValueError, match="expected one of auto, ptb"):
        tokenization.choose("moses")


def test_lines_are_one_line_each():
    with pytest.raises(ValueError, match="line break"):
        java.check_lines(["a\u2028b"])
