"""How sure a figure of a set is, and whether two systems differ on it, by resampling its items.

A figure is a function of sums over items: a mean of sum and count, corpus BLEU of ten counts. So a
thousand resampled sets are one product of matrices. Efron, 1979 (bootstrap); Noreen, 1989
(approximate randomisation); Koehn, EMNLP 2004, for both on BLEU.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

NUM_SAMPLES = 1000
_BLOCK = 4_000_000  # numbers drawn at once


class Statistic(NamedTuple):
    """A figure of a set.

    rows: float64 [N, K], what each item adds.
    of_sums: the figure of their sums: [..., K] to [...].
    """

    rows: np.ndarray
    of_sums: Callable[[np.ndarray], Any]

    @property
    def value(self) -> float:
        """The figure of the whole set."""
        return float(self.of_sums(self.rows.sum(0)))

    def at(self, items: np.ndarray) -> "Statistic":
        """The figure of some items: int or bool [N]."""
        return self._replace(rows=self.rows[items])


class Difference(NamedTuple):
    """Second minus first: its value, its 95 % interval, and how likely one as large is by chance.

    p_value: two-sided, in (0, 1]; of approximate randomisation.
    """

    value: float
    low: float
    high: float
    p_value: float


def mean_of(values: np.ndarray) -> Statistic:
    """The mean of the items that are not NaN; NaN where none is."""
    has_value = ~np.isnan(values)
    return share_of(np.where(has_value, values, 0.0), has_value)


def share_of(parts: np.ndarray, wholes: np.ndarray) -> Statistic:
    """The sum of the items' parts / the sum of their wholes; NaN where that is 0."""
    return Statistic(np.stack([parts, wholes], axis=1).astype(np.float64), _ratio)


def values_of(statistics: Mapping[str, Statistic]) -> dict[str, float]:
    """The figures of the whole set."""
    return {name: statistic.value for name, statistic in statistics.items()}


def intervals(
    statistics: Mapping[str, Statistic], *, seed: int = 0, num_samples: int = NUM_SAMPLES
) -> dict[str, tuple[float, float]]:
    """The 95 % interval (lower, upper) of each figure of one set: percentiles of the bootstrap.

    Figures that are not finite in every resampled set are left out.
    """
    if not statistics:
        return {}
    size = len(next(iter(statistics.values())).rows)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    for weights in _resampled(size, num_samples, seed):
        for name, statistic in statistics.items():
            drawn[name].append(statistic.of_sums(weights @ statistic.rows))
    found = {name: np.concatenate(values) for name, values in drawn.items()}
    return {name: _bounds(v) for name, v in found.items() if np.isfinite(v).all()}


def compare(
    first: Statistic, second: Statistic, *, seed: int = 0, num_samples: int = NUM_SAMPLES
) -> Difference:
    """How two systems differ on the same items, row for row.

    The interval is of the paired bootstrap. The p-value is the share of sets in which as large a
    difference arises when each item's results are swapped by the toss of a coin.
    Raises `ValueError` where the items differ in number.
    """
    if first.rows.shape != second.rows.shape:
        raise ValueError(f"rows {first.rows.shape} and {second.rows.shape}: expected the same")
    observed = second.value - first.value
    size, drawn, swapped = len(first.rows), [], []
    for weights in _resampled(size, num_samples, seed):
        drawn.append(second.of_sums(weights @ second.rows) - first.of_sums(weights @ first.rows))
    totals, moved = (first.rows.sum(0), second.rows.sum(0)), second.rows - first.rows
    rng = np.random.default_rng([seed, 1])
    for count in _blocks(size, num_samples):
        change = rng.integers(2, size=(count, size)).astype(np.float64) @ moved
        swapped.append(second.of_sums(totals[1] - change) - first.of_sums(totals[0] + change))
    # Sums of floats in another order differ by rounding, and would hide a tie.
    as_large = np.abs(np.concatenate(swapped)) >= abs(observed) * (1 - 1e-9) - 1e-12
    p_value = float((as_large.sum() + 1) / (num_samples + 1))
    return Difference(observed, *_bounds(np.concatenate(drawn)), p_value)


def _ratio(sums: np.ndarray) -> np.ndarray:
    counts = sums[..., 1]
    return np.divide(sums[..., 0], counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def _bounds(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def _blocks(size: int, num_samples: int) -> Iterator[int]:
    """How many resampled sets of `size` items to draw at once."""
    block = max(1, _BLOCK // max(1, size))
    for done in range(0, num_samples, block):
        yield min(block, num_samples - done)


def _resampled(size: int, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    """float64 [block, size]: how often each item is in each resampled set."""
    rng = np.random.default_rng([seed, 0])
    for count in _blocks(size, num_samples):
        places = rng.integers(size, size=(count, size)) + np.arange(count)[:, None] * size
        yield np.bincount(places.ravel(), minlength=count * size).reshape(count, size).astype(float)
