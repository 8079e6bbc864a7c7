import itertools
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from capjax.data.stream import block_example_index, example_index, mix, position_rng

seeds = st.integers(0, 2**63)
epochs = st.integers(0, 2**20)
counts = st.integers(1, 400)
blocks = st.integers(1, 50)
windows = st.integers(1, 9)


def epoch_order(seed, epoch, count, block_size, window):
    first = epoch * count
    return [block_example_index(seed, first + i, count, block_size, window) for i in range(count)]


def test_order_of_examples_is_as_it_was():
    """A run that goes on after an update of capjax reads on where it stood."""
    assert [example_index(3, p, 10) for p in range(12)] == [6, 0, 3, 9, 2, 1, 7, 5, 8, 4, 5, 0]


@given(seeds, st.integers(0, 2**64 - 1))
def test_random_numbers_of_a_position_are_those_of_philox_with_its_key(seed, position):
    key = np.array([mix(seed), position], np.uint64)
    ours, want = position_rng(seed, position).bit_generator, np.random.Philox(key=key)
    for generator in (ours, ours.jumped(2)):
        np.testing.assert_array_equal(generator.random_raw(9), want.random_raw(9))
        want = np.random.Philox(key=key).jumped(2)


@given(seeds, epochs, counts, blocks, windows)
def test_each_example_once_an_epoch_and_always_the_same(seed, epoch, count, block_size, window):
    order = epoch_order(seed, epoch, count, block_size, window)
    assert sorted(order) == list(range(count))
    assert order == epoch_order(seed, epoch, count, block_size, window)


@given(seeds, epochs, counts, blocks, windows)
def test_windows_of_positions_lie_in_few_blocks(seed, epoch, count, block_size, window):
    order = [i // block_size for i in epoch_order(seed, epoch, count, block_size, window)]
    length = window * block_size
    for first in range(0, count, length):
        assert len(set(order[first : first + length])) <= window + 2
    for first in range(0, count, 7):
        assert len(set(order[first : first + length])) <= 2 * window + 4


def test_a_cache_of_three_windows_reads_each_block_once():
    kept, reads = [], Counter()
    for position in range(10_000):
        block = block_example_index(5, position, 10_000, 32, 4) // 32
        if block not in kept:
            reads[block] += 1
        kept = [*(other for other in kept if other != block), block][-12:]
    assert set(reads.values()) == {1}


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(seed, epoch, 60, 4, 3)) for seed in range(9) for epoch in range(9)}
    assert len(orders) == 81


def test_no_example_comes_early_or_late_in_every_epoch():
    """The short block has no fixed place either."""
    total, epochs, count = Counter(), 400, 103
    for epoch in range(epochs):
        order = epoch_order(1, epoch, count, 4, 2)
        total.update({index: place for place, index in enumerate(order)})
    deviation = count / 12**0.5 / epochs**0.5  # of the mean of that many places
    assert all(abs(total[i] / epochs - 51) < 5 * deviation for i in range(count)), total


def test_neighbours_are_mixed_within_a_window():
    order = epoch_order(0, 0, 4096, 32, 16)
    neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(order))
    assert neighbours < 40
