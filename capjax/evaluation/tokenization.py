"""Captions as the tokens that the field's figures are computed on: Penn Treebank, no punctuation.

The reference is the tokenizer of Stanford CoreNLP 3.4.1, a Java program (`java.ptb_tokenize`).
`treebank` follows it without Java, as far as captions need it: docs/evaluation.md says how far. Its
quirks are kept (brackets stay, as `-lrb-`; "?!" stays; what lies beyond the Basic Multilingual
Plane, such as most emoji, is dropped), since figures are compared with those of others.
"""

import re
from collections.abc import Sequence

from capjax.evaluation import java

TOKENIZERS = ("auto", "ptb", "treebank", "none")

# Taken out after tokenising, as the reference code does. Its list has brackets in upper case, which
# lower-cased tokens never match; so they stay.
_QUOTES_AND_BRACKETS = {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"}
PUNCTUATION = frozenset(_QUOTES_AND_BRACKETS | {*".?!,:-;", "--", "..."})

_BREAKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_BEYOND_BASIC_PLANE = re.compile(r"[\U00010000-\U0010ffff]+")
_RESPELL = str.maketrans(
    {
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
        "«": '"',
        "»": '"',
        "–": " -- ",
        "—": " -- ",
        "―": " -- ",
        "…": " ... ",
        "£": " # ",
        "€": " $ ",
        "¢": " cents ",
        "½": " 1/2 ",
        "¼": " 1/4 ",
        "¾": " 3/4 ",
        "⅓": " 1/3 ",
        "⅔": " 2/3 ",
        "⅛": " 1/8 ",
    }
)
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">"}
_ENTITY = re.compile("|".join(_ENTITIES))
_DASHES = re.compile(r"(?<!-)-{2,4}(?!-)")
_BRACKETS = {"(": "lrb", ")": "rrb", "[": "lsb", "]": "rsb", "{": "lcb", "}": "rcb"}
_BRACKET = re.compile(r"[()\[\]{}]")

# Kept with their full stop wherever they stand.
_ABBREVIATIONS = (
    "mr mrs ms dr prof rev gen sgt lt col capt maj adm gov pres sen rep hon messrs esq jr sr bros "
    "st ave blvd rd mt ft sq ct co corp inc ltd dept univ tel ext vs cf etc al est ph\\.d "
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri"
)
_CLITIC = r"(?:'(?:s|re|ve|ll|d|m)|n't)(?![^\W_])"
_LETTER = r"[^\W\d_²³¹]"
# With the marks that are no letters of their own: accents, and vowels of Hebrew to Lao.
_ALPHANUMERIC = r"(?:[^\W_²³¹]|[\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0eff])"
_TOKEN = re.compile(
    rf"""
      (?:https?://|www\.)[^\s<>"]*[^\s<>".,!?;:'()]             # addresses
    | {_ALPHANUMERIC}[\w.+-]*@{_ALPHANUMERIC}[\w-]*(?:\.{_ALPHANUMERIC}+)*
    | </?[a-z!][^<>]*>                                          # marks such as <unk>
    | [:;=]-?(?:[()]|(?<![^\W_].)[dp3])(?!{_ALPHANUMERIC})      # faces
    | 'n'|(?<!{_ALPHANUMERIC})'(?:\d\ds?|cause|em|til|n)(?!{_ALPHANUMERIC})  # '90s, 'em
    | '(?=t(?:is|was)\b)t                                       # 't is
    | {_CLITIC}
    | (?:{"|".join(_ABBREVIATIONS.split())})\.(?!{_ALPHANUMERIC})
    | (?:no|fig)\.(?=\s?\d)
    | {_LETTER}(?:\.{_LETTER})*\.(?!{_ALPHANUMERIC})            # u.s., a.m., plan b.
    | (?:(?<![^\W_])[-+])?\d*(?:[.,:]\d+)+(?:-{_LETTER}+)*      # 1,000 and 12:30 and 3.5-inch
    | (?<![^\W_])[-+]\d+|\+\d+
    | can(?=not\b)|(?:(?:gon|wan)(?=na)|got(?=ta)|(?:lem|gim)(?=me))(?=..(?![\w-]))
    | [@\#]{_LETTER}{_ALPHANUMERIC}*
    | y'(?={_LETTER})                                           # y' all
    | {_ALPHANUMERIC}+?(?=n't(?![^\W_]))                        # do n't
    | {_ALPHANUMERIC}+(?:(?:[-./!?]|_(?=[^\W_])|'(?!(?:s|re|ve|ll|d|m|n)(?![^\W_]))(?=[^\W\d_]))
        {_ALPHANUMERIC}+)*
    | ''|``|\.\.\.|[!?]+|-{{5,}}|\*+|\S
    """,
    re.VERBOSE,
)


def one_line(caption: str) -> str:
    """The caption with control characters and runs of white space as single spaces.

    Tools that read a caption a line would otherwise give every later caption to the wrong image.
    """
    return _BREAKS.sub(" ", caption).strip()


def treebank(caption: str) -> str:
    """The caption's lower-case Treebank tokens with single spaces between, without punctuation."""
    text = _BEYOND_BASIC_PLANE.sub(" ", one_line(caption)).translate(_RESPELL).lower()
    text = _DASHES.sub(" -- ", _ENTITY.sub(lambda match: _ENTITIES[match[0]], text))
    tokens = [token for token in _TOKEN.findall(text) if token not in PUNCTUATION]
    spelled = [_BRACKET.sub(lambda match: f"-{_BRACKETS[match[0]]}-", token) for token in tokens]
    return " ".join(token for token in spelled if token != '"')


def drop_punctuation(tokens: str) -> str:
    """Tokens with spaces between, without those of `PUNCTUATION`."""
    return " ".join(token for token in tokens.split() if token not in PUNCTUATION)


def choose(tokenizer: str) -> str:
    """The tokenizer that "auto" means on this machine: ptb where its program runs, else treebank.

    Raises `UserError` for ptb where its program is missing; `ValueError` for an unknown name.
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer={tokenizer}: expected one of {', '.join(TOKENIZERS)}")
    if tokenizer == "auto":
        return "treebank" if java.why_missing() else "ptb"
    if tokenizer == "ptb":
        java.require()
    return tokenizer


def tokenize(captions: Sequence[str], tokenizer: str) -> list[str]:
    """Each caption's tokens with single spaces between.

    Args:
      tokenizer: "ptb" (the reference, Java), "treebank" (its rules without Java), "none" (words
        are what lies between spaces: for text that is tokenised already) or "auto" (`choose`).
    """
    tokenizer = choose(tokenizer)
    lines = [one_line(caption) for caption in captions]
    if tokenizer == "none":
        return lines
    if tokenizer == "treebank":
        return [treebank(line) for line in lines]
    return [drop_punctuation(line) for line in java.ptb_tokenize(lines)]
