"""Two systems on the same images: their figures side by side, and whether they differ by chance."""

import re
from typing import Any, NamedTuple

import numpy as np

from capjax.errors import UserError
from capjax.evaluation import intervals
from capjax.evaluation.agreement import agreement
from capjax.evaluation.caption_files import CaptionSet
from capjax.evaluation.intervals import Difference, Statistic
from capjax.evaluation.measured import Measured
from capjax.evaluation.meteor import Meteor

Interval = tuple[float, float]


class Compared(NamedTuple):
    """One figure of two systems; `difference` is None where it is not one of items in pairs."""

    metric: str
    first: float
    second: float
    first_interval: Interval | None = None
    second_interval: Interval | None = None
    difference: Difference | None = None


class Comparison(NamedTuple):
    """What was compared.

    num_items: images that both have; 0 where figures of whole sets are all there is.
    notes: of the first as of `Measured`, where captions were measured here.
    skipped: as of `Measured`.
    """

    num_items: int
    rows: list[Compared]
    notes: dict[str, Any] = {}  # noqa: RUF012 (never mutated)
    skipped: dict[str, str] = {}  # noqa: RUF012 (never mutated)


def compare_captions(
    first: CaptionSet,
    second: CaptionSet,
    *,
    tokenizer: str = "auto",
    java: bool | Meteor | None = None,
    seed: int = 0,
) -> Comparison:
    """Every figure of `agreement.measure_captions`, of the images that both have, tested in pairs.

    Raises `UserError` where they have no image in common, or different references for one.
    """
    keys = _common(first.keys, second.keys)
    first, second = first.at(keys), second.at(keys)
    references = first.references or second.references
    if first.references and second.references:
        _check_references(keys, first.references, second.references)
    found = [
        agreement(captions.candidates, references, tokenizer=tokenizer, java=java)
        for captions in (first, second)
    ]
    compared = _compare(found[0].statistics, found[1].statistics, seed)
    whole = [Compared(name, found[0].whole[name], found[1].whole[name]) for name in found[0].whole]
    return Comparison(len(keys), [*compared, *whole], found[0].notes, found[0].skipped)


def compare_measured(first: Measured, second: Measured, *, seed: int = 0) -> Comparison:
    """The figures that both results have: tested in pairs where they are means of items.

    Raises `UserError` where both have items and no image in common.
    """
    keys = _common(first.keys, second.keys) if first.keys and second.keys else ()
    tested = _compare(_means(first, keys), _means(second, keys), seed)
    compared = {row.metric: row for row in tested}
    rows = [
        compared.get(name)
        or Compared(
            name,
            first.metrics[name],
            second.metrics[name],
            first.intervals.get(name),
            second.intervals.get(name),
        )
        for name in first.metrics
        if name in second.metrics
    ]
    return Comparison(len(keys), rows)


def _common(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    others = set(second)
    keys = tuple(key for key in first if key in others)
    if not keys:
        raise UserError(
            f"no image in common: keys such as {first[0]} and {second[0]}; compare evaluations of "
            "the same images"
        )
    return keys


def _check_references(
    keys: tuple[str, ...], first: list[list[str]], second: list[list[str]]
) -> None:
    for key, ours, theirs in zip(keys, first, second, strict=True):
        if sorted(ours) != sorted(theirs):
            raise UserError(
                f"{key}: references differ between the two, {ours} and {theirs}; compare captions "
                "of the same images, or give the references with --references"
            )


def _means(measured: Measured, keys: tuple[str, ...]) -> dict[str, Statistic]:
    """The metrics that are means of items, of the items of `keys`: also recalls, of their ranks."""
    place = {key: row for row, key in enumerate(measured.keys)}
    rows = np.array([place[key] for key in keys], np.int64)
    found = {}
    for name, value in measured.metrics.items():
        recall = re.fullmatch(r"(.+)_r(\d+)", name)
        if name in measured.items:
            items = np.asarray(measured.items[name], np.float64)
        elif recall and f"{recall[1]}_rank" in measured.items:
            rank = np.asarray(measured.items[f"{recall[1]}_rank"], np.float64)
            items = np.where(np.isnan(rank), np.nan, rank <= int(recall[2]))
        else:
            continue
        statistic = intervals.mean_of(items)
        if np.isclose(statistic.value, value):
            found[name] = statistic.at(rows)
    return found if keys else {}


def _compare(
    first: dict[str, Statistic], second: dict[str, Statistic], seed: int
) -> list[Compared]:
    """The figures that both have, of the same items."""
    bounds = [intervals.intervals(statistics, seed=seed) for statistics in (first, second)]
    return [
        Compared(
            name,
            statistic.value,
            second[name].value,
            bounds[0].get(name),
            bounds[1].get(name),
            intervals.compare(statistic, second[name], seed=seed),
        )
        for name, statistic in first.items()
        if name in second
    ]
