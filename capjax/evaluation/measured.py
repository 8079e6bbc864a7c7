"""What an evaluation found: numbers of the whole set, their items, and what could not be measured.

A file of it is what pages and comparisons read.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from etils import epath

from capjax.errors import UserError
from capjax.training.workdir import write_atomic

Value = TypeVar("Value")


class Measured(NamedTuple):
    """The result of one evaluation of one set.

    metrics: names to numbers of the whole set.
    items: names to one value an item, in the order of `keys`; NaN where an item has none. Where
      `metrics` has the same name, it is the mean of the items that have one, unless its
      interval says otherwise.
    keys: the items' keys; empty where there are no items.
    intervals: names to the (lower, upper) bound of a 95 % interval.
    skipped: names of what was not measured, and why.
    notes: how it was measured: tokenizer, judge, prompt, seeds.
    """

    metrics: dict[str, float]
    items: dict[str, np.ndarray] = {}  # noqa: RUF012 (never mutated)
    keys: tuple[str, ...] = ()
    intervals: dict[str, tuple[float, float]] = {}  # noqa: RUF012 (never mutated)
    skipped: dict[str, str] = {}  # noqa: RUF012 (never mutated)
    notes: dict[str, Any] = {}  # noqa: RUF012 (never mutated)


def write_measured(path: epath.PathLike, measured: Measured) -> None:
    """Writes one JSON object, all or nothing; what is not finite is written as null."""
    content = measured._asdict() | {
        "metrics": {name: _number(value) for name, value in measured.metrics.items()},
        "items": {
            name: [_number(value) for value in np.asarray(values).tolist()]
            for name, values in measured.items.items()
        },
    }
    write_atomic(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def read_measured(path: epath.PathLike) -> Measured:
    """What `write_measured` wrote. Raises `UserError` where the file holds something else."""
    try:
        content = json.loads(epath.Path(path).read_text())
        return Measured(
            metrics={name: _value(value) for name, value in content["metrics"].items()},
            items={
                name: np.array([_value(value) for value in values])
                for name, values in content["items"].items()
            },
            keys=tuple(content["keys"]),
            intervals={name: (low, high) for name, (low, high) in content["intervals"].items()},
            skipped=content["skipped"],
            notes=content["notes"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a file that `capjax evaluate` wrote ({type(error).__name__}: {error})"
        ) from error


def join(parts: Mapping[str, Measured]) -> Measured:
    """Several results of one set as one.

    Items are put beside each other by their keys; what a part does not have of an item is NaN, or
    "" where it is a text. Raises `ValueError` where two parts name the same thing.
    """
    keys = tuple(dict.fromkeys(key for part in parts.values() if part.items for key in part.keys))
    return Measured(
        metrics=_merged({name: part.metrics for name, part in parts.items()}),
        items=_merged({name: _aligned(part, keys) for name, part in parts.items()}),
        keys=keys,
        intervals=_merged({name: part.intervals for name, part in parts.items()}),
        skipped=_merged({name: part.skipped for name, part in parts.items()}),
        notes=_merged({name: part.notes for name, part in parts.items()}),
    )


def _aligned(part: Measured, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The items in the order of `keys`."""
    if part.keys == keys:
        return part.items
    places = {key: place for place, key in enumerate(keys)}
    rows = [places[key] for key in part.keys]
    found = {}
    for name, values in part.items.items():
        is_text = values.dtype.kind in "OUS"
        whole = np.full(len(keys), "" if is_text else math.nan, object if is_text else np.float64)
        whole[rows] = values
        found[name] = whole
    return found


def _merged(parts: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
    whole: dict[str, Value] = {}
    for name, part in parts.items():
        if twice := whole.keys() & part.keys():
            raise ValueError(f"{name}: {sorted(twice)} measured twice")
        whole.update(part)
    return whole


def _number(value: int | float | str) -> int | float | str | None:
    return value if isinstance(value, str) or math.isfinite(value) else None


def _value(value: Any) -> Any:
    return math.nan if value is None else value
