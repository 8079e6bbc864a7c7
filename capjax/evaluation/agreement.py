"""Captions against the references that people wrote: the figures of caption papers, on strings."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from capjax.evaluation import bleu, diversity, intervals, meteor, spice, tokenization
from capjax.evaluation.intervals import Statistic
from capjax.evaluation.java import require, why_missing
from capjax.evaluation.measured import Measured
from capjax.evaluation.meteor import Meteor
from capjax.evaluation.rouge import rouge_l
from capjax.rewards import consensus

Candidates = Sequence[str | Sequence[str]]  # of each image: one caption, or several, best first


class Agreement(NamedTuple):
    """What was measured of each caption, before it is one figure.

    statistics: figures that are functions of sums over the items.
    items: one value an item.
    whole: figures of the whole set alone.
    skipped, notes: as in `Measured`.
    """

    statistics: dict[str, Statistic]
    items: dict[str, np.ndarray]
    whole: dict[str, float]
    skipped: dict[str, str]
    notes: dict[str, Any]


def measure_captions(
    candidates: Candidates,
    references: Sequence[str | Sequence[str]] | None,
    keys: Sequence[str],
    *,
    tokenizer: str = "auto",
    java: bool | Meteor | None = None,
    seed: int = 0,
) -> Measured:
    """BLEU, ROUGE-L, CIDEr-D, CIDEr, METEOR, SPICE, diversity, vocabulary and length.

    Args:
      candidates: of each image its caption, or several, of which the first is compared with the
        references and all with one another.
      references: of each image, at least one; None where there are none to compare with.
      keys: of the images; they differ.
      tokenizer: one of `tokenization.TOKENIZERS`.
      java: whether to run METEOR and SPICE; None: where their programs are installed; a METEOR
        that runs already saves its start.
      seed: of the resampled sets behind the intervals.

    Raises `ValueError` where there is nothing to measure, lengths differ, keys repeat, or an image
    has no caption or no reference; `UserError` where a Java program that was asked for is missing.
    """
    if len(keys) != len(candidates) or len(set(keys)) != len(keys):
        raise ValueError(f"{len(set(keys))} different keys of {len(candidates)} images")
    found = agreement(candidates, references, tokenizer=tokenizer, java=java)
    values = {name: statistic.value for name, statistic in found.statistics.items()}
    return Measured(
        metrics=values | found.whole,
        items=found.items,
        keys=tuple(keys),
        intervals=intervals.intervals(found.statistics, seed=seed),
        skipped=found.skipped,
        notes=found.notes,
    )


def agreement(
    candidates: Candidates,
    references: Sequence[str | Sequence[str]] | None,
    *,
    tokenizer: str = "auto",
    java: bool | Meteor | None = None,
) -> Agreement:
    """`measure_captions` without intervals, with what they are computed from."""
    captions = _listed("candidates", candidates)
    known = _listed("references", references) if references is not None else []
    if known and len(known) != len(captions):
        raise ValueError(f"captions of {len(captions)} images, references of {len(known)}")
    tokenizer = tokenization.choose(tokenizer)
    tokens = _tokens([*captions, *known], tokenizer)
    several, known_tokens = tokens[: len(captions)], tokens[len(captions) :]
    firsts = [image[0] for image in several]
    found = Agreement({}, {}, {}, {}, {"tokenizer": tokenizer, "num_items": len(captions)})
    _add(found, "num_words", np.array([len(caption) for caption in firsts], np.float64))
    found.whole["vocabulary_size"] = float(len({word for words in firsts for word in words}))
    if tokenizer == "ptb":
        found.notes["treebank_agreement"] = _treebank_share([*captions, *known], tokens)
    frequencies = consensus.document_frequencies(known_tokens or several)
    if known:
        _add_agreement(found, firsts, known_tokens, frequencies)
        _add_programs(found, firsts, known_tokens, java)
    if max(map(len, several)) > 1:
        found.notes["candidates"] = "the first against the references, all for diversity"
        _add_diversity(found, several, frequencies)
    return found


def _add_agreement(found: Agreement, firsts, references, frequencies) -> None:
    counts = bleu.counts(firsts, references)
    for order in range(bleu.MAX_ORDER):
        name = f"bleu_{order + 1}"
        found.statistics[name] = Statistic(counts, _bleu_of_order(order))
        found.items[name] = bleu.bleu(counts)[:, order]
    _add(found, "rouge_l", rouge_l(firsts, references))
    _add(found, "cider_d", consensus.cider_d(firsts, references, frequencies))
    _add(found, "cider_plain", consensus.cider(firsts, references, frequencies))


def _add_programs(found: Agreement, firsts, references, java: bool | Meteor | None) -> None:
    """METEOR and SPICE, or why they are missing."""
    texts = [" ".join(words) for words in firsts]
    known = [[" ".join(words) for words in image] for image in references]
    if java is True:
        require()
    reason = "not asked for" if java is False else why_missing()
    if reason:
        found.skipped["meteor"] = reason
    else:
        with contextlib.ExitStack() as stack:
            program = java if isinstance(java, Meteor) else stack.enter_context(Meteor())
            counts = program.counts(texts, known)
        found.statistics["meteor"] = Statistic(counts, meteor.score)
        found.items["meteor"] = np.asarray(meteor.score(counts))
    if reason := reason or spice.why_missing():
        found.skipped["spice"] = reason
    else:
        _add(found, "spice", spice.spice(texts, known))


def _add_diversity(found: Agreement, several, frequencies) -> None:
    """Figures of images with several captions; NaN for the others."""
    has_several = np.array([len(image) > 1 for image in several])
    for order in (1, 2):
        ratios = np.array([diversity.distinct_ngrams(image, order) for image in several])
        _add(found, f"div_{order}", np.where(has_several, ratios, np.nan))
    _add(found, "mbleu_4", np.array([diversity.mutual_bleu(image)[-1] for image in several]))
    _add(found, "self_cider", diversity.self_cider(several, frequencies))


def _add(found: Agreement, name: str, values: np.ndarray) -> None:
    found.items[name] = values
    found.statistics[name] = intervals.mean_of(values)


def _bleu_of_order(order: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda sums: bleu.bleu(sums)[..., order]


def _listed(name: str, texts: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """Of each image its texts as a list, checked."""
    listed = [[text] if isinstance(text, str) else list(text) for text in texts]
    if isinstance(texts, str) or not listed:
        raise ValueError(f"{name}: expected the texts of at least one image")
    if not all(listed):
        raise ValueError(f"{name}: image {listed.index([])} has none")
    return listed


def _tokens(images: list[list[str]], tokenizer: str) -> list[list[list[str]]]:
    """The tokens of every text, in one call, as the Java tokenizer takes a second to start."""
    flat = iter(tokenization.tokenize([text for image in images for text in image], tokenizer))
    return [[next(flat).split() for _ in image] for image in images]


def _treebank_share(images: list[list[str]], tokens: list[list[list[str]]]) -> float:
    """Share of the texts that the Java-free tokenizer splits as the reference does."""
    same = [
        tokenization.treebank(text).split() == words
        for texts, image in zip(images, tokens, strict=True)
        for text, words in zip(texts, image, strict=True)
    ]
    return float(np.mean(same))
