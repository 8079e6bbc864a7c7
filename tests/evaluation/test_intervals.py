"""Intervals and paired tests against closed forms."""

import numpy as np
import pytest

from capjax.evaluation import intervals
from capjax.evaluation.intervals import Statistic, compare, mean_of, share_of


def test_a_mean_has_the_interval_of_the_normal_law():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    statistic = mean_of(np.append(values, [np.nan, np.nan]))
    assert statistic.value == pytest.approx(values.mean())
    low, high = intervals.intervals({"x": statistic}, num_samples=4000)["x"]
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_a_share_of_sums_has_the_interval_of_the_delta_method():
    rng = np.random.default_rng(0)
    wholes = rng.integers(0, 5, 400)
    parts = rng.binomial(wholes, 0.3)
    statistic = share_of(parts, wholes)
    assert statistic.value == parts.sum() / wholes.sum()
    low, high = intervals.intervals({"x": statistic}, num_samples=4000)["x"]
    half = 1.96 * (parts - statistic.value * wholes).std() / wholes.mean() / 20
    assert low == pytest.approx(statistic.value - half, abs=0.004)
    assert high == pytest.approx(statistic.value + half, abs=0.004)
    assert np.isnan(share_of(np.zeros(3), np.zeros(3)).value)


def test_the_same_seed_gives_the_same_interval_in_blocks_of_any_size(monkeypatch):
    statistics = {"x": mean_of(np.arange(50.0)), "y": mean_of(np.arange(50.0) ** 2)}
    found = intervals.intervals(statistics, seed=3)
    assert found == intervals.intervals(statistics, seed=3)
    assert found != intervals.intervals(statistics, seed=4)
    monkeypatch.setattr(intervals, "_BLOCK", 170)
    assert found == intervals.intervals(statistics, seed=3)


def test_what_is_not_finite_has_no_interval():
    statistics = {"none": mean_of(np.full(5, np.nan)), "one": mean_of(np.arange(5.0))}
    assert np.isnan(statistics["none"].value)
    assert set(intervals.intervals(statistics)) == {"one"}
    assert intervals.intervals({}) == {}


def test_a_pair_of_systems():
    rng = np.random.default_rng(1)
    hard = rng.normal(size=300)  # items differ more than systems do
    first, second = mean_of(hard), mean_of(hard + rng.normal(0.05, 0.1, 300))
    found = compare(first, second)
    assert found.value == pytest.approx(second.value - first.value)
    assert 0 < found.low < found.value < found.high < 0.1
    assert found.p_value == pytest.approx(1 / 1001)
    back = compare(second, first)
    assert back.value == pytest.approx(-found.value)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    same = compare(first, first)
    assert same == pytest.approx((0.0, 0.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="expected the same"):
        compare(first, mean_of(hard[:5]))


def test_the_p_value_of_few_items_is_the_share_of_swaps():
    # All of eight items better: of 256 ways to swap, two differ as much.
    found = compare(mean_of(np.zeros(8)), mean_of(np.ones(8)), num_samples=20_000)
    assert found.p_value == pytest.approx(2 / 256, abs=0.002)


def test_no_difference_is_found_significant_one_time_in_twenty():
    rng = np.random.default_rng(2)
    low = [
        compare(mean_of(rng.normal(size=40)), mean_of(rng.normal(size=40)), num_samples=199).p_value
        for _ in range(300)
    ]
    assert np.mean(np.array(low) <= 0.05) == pytest.approx(0.05, abs=0.03)


def test_a_figure_that_is_no_mean_is_compared_by_its_sums():
    rows = np.stack([np.arange(1.0, 21.0), np.full(20, 4.0)], axis=1)
    ratio = Statistic(rows, lambda sums: sums[..., 0] / sums[..., 1])
    assert ratio.value == pytest.approx(210 / 80)
    half = ratio._replace(rows=rows * [0.5, 1.0])
    assert compare(ratio, half).value == pytest.approx(-105 / 80)
    assert ratio.at(np.array([0, 1])).value == pytest.approx(3 / 8)
