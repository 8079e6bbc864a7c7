"""Draws of modes, orders and masks: their law, and that they come from positions alone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.mesh import MeshShape, act_B, act_BL, make_mesh
from capjax.objectives.parallel_draw import (
    are_parallel,
    causal_rows_of_group,
    draw_masked,
    draw_orders,
    draw_rows,
    join_groups,
    take_in_groups,
)

KEY = jax.random.key(3)
MESHES = [MeshShape(data=8), MeshShape(data=1, fsdp=8), MeshShape(data=2, fsdp=2, tensor=2)]


def positions(num_rows, start=0):
    return jnp.arange(start, start + num_rows, dtype=jnp.uint32)


def assert_rate(draws, rate):
    deviation = np.sqrt(rate * (1 - rate) / draws.size)
    assert abs(np.mean(draws) - rate) < 4 * deviation


def test_rows_come_at_the_given_rate_and_from_the_position_alone():
    position_B = positions(4000)
    for fraction in (0.25, 0.75):
        is_parallel_B = draw_rows(KEY, position_B, fraction)
        assert_rate(is_parallel_B, fraction)
    np.testing.assert_array_equal(draw_rows(KEY, position_B[::-7], 0.75), is_parallel_B[::-7])
    assert draw_rows(KEY, position_B, 1.0).all()
    assert not draw_rows(KEY, position_B, 0.0).any()
    other_B = draw_rows(jax.random.key(4), position_B, 0.75)
    assert (other_B != is_parallel_B).mean() > 0.3


def test_groups_hold_the_fraction_exactly():
    assert causal_rows_of_group(0.75) == (1, 4)
    assert causal_rows_of_group(0.5) == (1, 2)
    assert causal_rows_of_group(2 / 3) == (1, 3)
    assert causal_rows_of_group(0.375) == (5, 8)
    for fraction in (0.7, 0.99, 1e-4, 1 / 9):
        with pytest.raises(UserError, match=r"parallel_fraction=.*nearest is .*bernoulli"):
            causal_rows_of_group(fraction)


@pytest.mark.parametrize(("num_causal", "group_size"), [(1, 4), (2, 5)])
def test_every_choice_of_causal_rows_is_as_likely(num_causal, group_size):
    num_groups = 4000
    orders_GJ = draw_orders(KEY, positions(num_groups * group_size), group_size)
    np.testing.assert_array_equal(jnp.sort(orders_GJ, 1), [range(group_size)] * num_groups)
    is_causal_GJ = ~are_parallel(orders_GJ, num_causal).reshape(num_groups, group_size)
    chosen = {tuple(sorted(order)) for order in np.asarray(orders_GJ[:, :num_causal])}
    choices = list(itertools.combinations(range(group_size), num_causal))
    assert chosen == set(choices)
    for choice in choices:
        mask_J = np.isin(np.arange(group_size), choice)
        assert_rate((np.asarray(is_causal_GJ) == mask_J[None]).all(1), 1 / len(choices))


def test_the_order_of_a_group_comes_from_its_position_alone():
    orders_GJ = draw_orders(KEY, positions(400), 4)
    np.testing.assert_array_equal(draw_orders(KEY, positions(40, start=80), 4), orders_GJ[20:30])
    assert (draw_orders(jax.random.key(4), positions(400), 4) != orders_GJ).any(1).mean() > 0.8


def test_rows_go_into_groups_and_back():
    x_RL = jnp.arange(24.0).reshape(8, 3)
    orders_GJ = jnp.array([[2, 0, 3, 1], [3, 2, 1, 0]])
    expected_R = np.array([2, 0, 3, 1, 7, 6, 5, 4])
    taken = take_in_groups({"x": x_RL, "row": jnp.arange(8)}, orders_GJ)
    assert taken["x"].shape == (2, 4, 3)
    np.testing.assert_array_equal(join_groups(taken)["row"], expected_R)
    np.testing.assert_array_equal(join_groups(taken)["x"], x_RL[expected_R])
    weights_GJL = jnp.arange(24.0).reshape(2, 4, 3)
    slope_RL = jax.grad(lambda x: jnp.vdot(weights_GJL, take_in_groups(x, orders_GJ)))(x_RL)
    np.testing.assert_array_equal(slope_RL[expected_R], join_groups(weights_GJL))
    np.testing.assert_array_equal(are_parallel(orders_GJ, 1), [1, 1, 0, 1, 1, 1, 1, 0])


def test_masks_have_the_count_of_big_vision_over_all_positions():
    labels_RL = jnp.zeros((3000, 5), jnp.int32)
    is_masked_RL = draw_masked(KEY, positions(3000), labels_RL, 0.5, among_tokens=False)
    assert (is_masked_RL.sum(1) == int(0.5 * 5)).all()
    for is_masked_R in is_masked_RL.T:
        assert_rate(is_masked_R, 2 / 5)
    assert draw_masked(KEY, positions(2), labels_RL[:2], 1.0, among_tokens=False).all()
    assert not draw_masked(KEY, positions(2), labels_RL[:2], 0.1, among_tokens=False).any()


def test_masks_among_tokens_have_a_share_of_them_and_at_least_one():
    lengths_R = np.arange(6000) % 7  # of six positions
    labels_RL = jnp.asarray(np.arange(6)[None] < lengths_R[:, None], jnp.int32)
    is_masked_RL = draw_masked(KEY, positions(6000), labels_RL, 0.5, among_tokens=True)
    assert not is_masked_RL[labels_RL == 0].any()
    counts = np.array([0, 1, 1, 1, 2, 2, 3])
    np.testing.assert_array_equal(is_masked_RL.sum(1), counts[lengths_R])
    for length in range(1, 7):
        for position in range(length):
            rows_R = np.asarray(is_masked_RL)[lengths_R == length, position]
            rate = counts[length] / length
            assert rows_R.all() if rate == 1 else assert_rate(rows_R, rate) is None


def test_counts_are_rounded_as_python_does():
    # 0.29 * 100 is 28.999999999999996 in double precision, and 29 in single.
    labels_RL = jnp.ones((1, 100), jnp.int32)
    for among_tokens in (False, True):
        masked = draw_masked(KEY, positions(1), labels_RL, 0.29, among_tokens=among_tokens)
        assert masked.sum() == 28


@pytest.mark.parametrize("shape", MESHES)
def test_draws_are_the_same_on_a_mesh(shape):
    rng = np.random.default_rng(0)
    position_R, labels_RL = positions(32), jnp.asarray(rng.integers(0, 3, (32, 6)), jnp.int32)

    def draws(position_R, labels_RL):
        orders_GJ = draw_orders(KEY, position_R, 4)
        return (
            draw_rows(KEY, position_R, 0.5),
            draw_masked(KEY, position_R, labels_RL, 0.5, among_tokens=True),
            join_groups(take_in_groups(labels_RL, orders_GJ)),
            are_parallel(orders_GJ, 1),
        )

    expected = draws(position_R, labels_RL)
    with jax.set_mesh(make_mesh(shape)):
        arguments = jax.device_put((position_R, labels_RL), (act_B, act_BL))
        lowered = jax.jit(draws).lower(*arguments)
        actual = jax.jit(draws)(*arguments)
        for x, y in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(x, y)
            assert jax.typeof(x).sharding.spec == (act_B if x.ndim == 1 else act_BL)
    program = lowered.compile().as_text()
    assert not any(name in program for name in ("all-gather", "all-to-all", "collective-permute"))


def test_groups_must_not_be_parted_by_devices():
    draw = jax.jit(functools.partial(draw_orders, group_size=4))
    with pytest.raises(UserError, match=r"6 rows on 1 devices .* a multiple of 4"):
        draw(KEY, positions(6))
    with (
        jax.set_mesh(make_mesh(MeshShape(data=8))),
        pytest.raises(UserError, match=r"16 rows on 8 devices .* a multiple of 32"),
    ):
        draw(KEY, jax.device_put(positions(16), act_B))
