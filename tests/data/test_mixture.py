"""The order of a mixture, by what it promises for any weights, schedule and position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capjax.data.mixture import BLOCK, MixtureOrder
from capjax.errors import UserError

weights_of = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.integers(0, 9), min_size=n, max_size=n).filter(any)
)


def order_of(*weights, seed=3):
    return MixtureOrder(seed, ((0, tuple(map(float, weights))),))


@settings(max_examples=50)
@given(weights_of, st.integers(0, 2**40), st.integers(0, 2**31))
def test_a_sources_own_positions_follow_each_other(weights, position, seed):
    order = order_of(*weights, seed=seed)
    expected = list(order.counts(position))
    for p in range(position, position + 100):
        source, own = order.place(p)
        assert own == expected[source]
        expected[source] += 1
    assert tuple(expected) == order.counts(position + 100)


@settings(max_examples=50)
@given(weights_of, st.integers(0, 2**40))
def test_no_count_drifts_from_its_weight(weights, block):
    counts = order_of(*weights).counts(block * BLOCK)
    assert sum(counts) == block * BLOCK
    exact = np.array(weights) * (block * BLOCK) / sum(weights)
    assert np.abs(np.array(counts) - exact).max() < len(weights) + 1e-9 * block * BLOCK
    assert all(count == 0 for count, weight in zip(counts, weights, strict=True) if weight == 0)


@settings(max_examples=50)
@given(weights_of, weights_of, st.integers(1, 5000), st.integers(0, 2**31))
def test_what_is_appended_to_a_schedule_changes_nothing_before_it(first, second, start, seed):
    second = (second * 5)[: len(first)]
    second = [*second[:-1], second[-1] + 1]
    old = MixtureOrder(seed, ((0, tuple(map(float, first))),))
    new = MixtureOrder(seed, ((0, tuple(map(float, first))), (start, tuple(map(float, second)))))
    for position in range(max(0, start - 50), start):
        assert new.place(position) == old.place(position)
    expected = list(old.counts(start))
    for position in range(start, start + 50):
        source, own = new.place(position)
        assert own == expected[source]
        assert second[source] > 0
        expected[source] += 1


@pytest.mark.parametrize("batch_size", [2, 4, 8, 64, 256])
def test_no_row_of_a_batch_sees_one_source_alone(batch_size):
    """With weights 1:1 and an even batch a cycle of two would give each row one source."""
    order, steps = order_of(1, 1), 4096 // batch_size + 64
    labels = np.array([order.place(p)[0] for p in range(steps * batch_size)])
    share = labels.reshape(steps, batch_size).mean(0)
    assert np.abs(share - 0.5).max() < 5 * 0.5 / np.sqrt(steps)  # five deviations of a fair coin


def test_the_order_is_random_access_and_depends_on_the_seed():
    order = order_of(3, 2, 1)
    positions = np.random.default_rng(0).permutation(5000)
    forward = [order.place(p) for p in range(5000)]
    again = order_of(3, 2, 1)
    assert all(again.place(int(p)) == forward[p] for p in positions)
    assert [order_of(3, 2, 1, seed=4).place(p) for p in range(50)] != forward[:50]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ((), "the first position 0"),
        (((5, (1.0,)),), "the first position 0"),
        (((0, (1.0,)), (0, (1.0,))), "each later one above"),
        (((0, (1.0, 2.0)), (9, (1.0,))), "as many weights in every entry"),
        (((0, (-1.0, 2.0)),), "numbers >= 0"),
        (((0, (0.0, 0.0)),), "one of them above 0"),
        (((0, (float("nan"), 1.0)),), "numbers >= 0"),
    ],
)
def test_what_makes_no_schedule_is_refused(schedule, words):
    with pytest.raises(UserError, match=words):
        MixtureOrder(0, schedule)
