"""Durations, schedules in closed form, one AdamW step by hand, the decay mask."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capjax.errors import UserError
from capjax.training.optimizer import (
    OptimizerConfig,
    duration,
    is_decayed,
    learning_rate_schedule,
    make_optimizer,
)

SIZES = {"batch_size": 32, "num_examples": 1000}
PLAIN = OptimizerConfig(
    learning_rate=0.1, schedule="constant", grad_clip_norm=0.0, weight_decay=0.0
)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"total_steps": 7}, 7),
        ({"total_steps": 7.0, "total_examples": None}, 7),
        ({"total_examples": 64}, 2),
        ({"total_examples": 65}, 3),
        ({"total_epochs": 1}, 32),
        ({"total_epochs": 2.5}, 79),
        ({"warmup_steps": 9, "total_steps": 3}, 3),
    ],
)
def test_durations_become_steps(settings, steps):
    assert duration("total", settings, **SIZES) == steps


def test_floating_point_adds_no_step():
    assert 1.1 * 100 > 110
    assert duration("total", {"total_epochs": 1.1}, batch_size=10, num_examples=100) == 11


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no total duration: give one of total_steps, total_examples, total_epochs"),
        ({"total_steps": 1, "total_epochs": 1}, "total_steps and total_epochs are both set"),
        ({"total_steps": 1.5}, "total_steps=1.5: expected a whole number of steps"),
        ({"total_steps": -1}, "total_steps=-1: expected a number, 0 or more"),
        ({"total_examples": "many"}, "total_examples='many': expected a number"),
        ({"total_steps": True}, "total_steps=True: expected a number"),
        ({"total_epochs": math.inf}, "total_epochs=inf: expected a number"),
    ],
)
def test_bad_durations_say_what_to_do(settings, message):
    with pytest.raises(UserError) as error:
        duration("total", settings, **SIZES)
    assert message in str(error.value)


def test_epochs_need_a_length_and_a_default_may_stand_in():
    with pytest.raises(UserError, match="the source has no length; give total_steps"):
        duration("total", {"total_epochs": 1}, batch_size=32)
    assert duration("warmup", {"total_epochs": 1}, batch_size=32, default=5) == 5


def rates(schedule, **fields):
    config = OptimizerConfig(learning_rate=0.5, schedule=schedule, **fields)
    return jax.vmap(learning_rate_schedule(config, 100))(jnp.arange(101))


def test_cosine_in_closed_form():
    rate = rates("cosine", warmup_steps=20)
    np.testing.assert_allclose(rate[:21], 0.5 * np.arange(21) / 20, rtol=1e-6)
    halves = 0.5 * 0.5 * (1 + np.cos(np.pi * np.arange(81) / 80))
    np.testing.assert_allclose(rate[20:], halves, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(rate[60], 0.25, rtol=1e-6)
    assert rate[100] == 0


def test_rsqrt_in_closed_form():
    rate = rates("rsqrt", warmup_steps=10, cooldown_steps=25, timescale=5.0)
    np.testing.assert_allclose(rate[:11], 0.5 * np.arange(11) / 10, rtol=1e-6)
    decay = 0.5 / np.sqrt(1 + np.arange(91) / 5)
    np.testing.assert_allclose(rate[10:76], decay[:66], rtol=1e-6)
    np.testing.assert_allclose(rate[76:], decay[66:] * np.arange(24, -1, -1) / 25, rtol=1e-6)
    np.testing.assert_allclose(rate[15], 0.5 / np.sqrt(2), rtol=1e-6)


def test_constant_without_and_with_ends():
    assert (rates("constant") == 0.5).all()
    rate = rates("constant", warmup_steps=2, cooldown_steps=4)
    np.testing.assert_allclose(rate[:4], [0, 0.25, 0.5, 0.5])
    np.testing.assert_allclose(rate[95:], [0.5, 0.5, 0.375, 0.25, 0.125, 0])


def test_schedule_parts_must_fit_the_run():
    config = dataclasses.replace(PLAIN, warmup_steps=8, cooldown_steps=3)
    with pytest.raises(UserError, match="more than total_steps=10"):
        make_optimizer(config, 10)
    with pytest.raises(UserError, match="total_steps=0"):
        make_optimizer(PLAIN, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "cosin"),
        ("first_moment_dtype", "float16"),
        ("b1", 1.0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", -0.1),
        ("warmup_steps", -1),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(UserError, match=f"optimizer.{field}="):
        OptimizerConfig(**{field: value})


def test_decay_falls_on_kernels_alone():
    layer = {"kernel": 1.0, "bias": 1.0, "scale": 1.0}
    tree = {"blocks": {"mlp": layer}, "embedding": 1.0, "kernel_size": 1.0}
    decayed = {"kernel": True, "bias": False, "scale": False}
    expected = {"blocks": {"mlp": decayed}, "embedding": False, "kernel_size": False}
    assert is_decayed(tree) == expected


def test_one_adamw_step_by_hand():
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="constant",
        weight_decay=0.5,
        b1=0.9,
        b2=0.98,
        eps=1e-3,
        grad_clip_norm=1.0,
    )
    tx, _ = make_optimizer(config, 10)
    params = {"kernel": jnp.array([2.0, -1.0]), "bias": jnp.array([3.0])}
    grads = {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([-4.0])}  # norm 5, clipped to 1
    state, moments = tx.init(params), {"kernel": (0.0, 0.0), "bias": (0.0, 0.0)}
    expected = jax.tree.map(np.asarray, params)
    for step in (1, 2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, decay in (("kernel", 0.5), ("bias", 0.0)):
            gradient = np.asarray(grads[name]) / 5
            m = 0.9 * moments[name][0] + 0.1 * gradient
            v = 0.98 * moments[name][1] + 0.02 * gradient**2
            moments[name] = (m, v)
            direction = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.98**step)) + 1e-3)
            expected[name] = expected[name] - 0.1 * (direction + decay * expected[name])
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)


def test_gradients_are_clipped_only_above_the_norm_and_only_where_asked():
    params = {"bias": jnp.zeros(2)}
    grads = {"bias": jnp.array([3.0, 4.0])}
    for limit, norm in ((0.0, 5.0), (1.0, 1.0), (10.0, 5.0)):
        tx, _ = make_optimizer(dataclasses.replace(PLAIN, grad_clip_norm=limit, b1=0.0), 10)
        _, state = tx.update(grads, tx.init(params), params)
        (moment,) = optax.tree.get_all_with_path(state, "mu")
        np.testing.assert_allclose(optax.tree.norm(moment[1]), norm, rtol=1e-6)


def test_the_first_moment_may_be_bfloat16():
    tx, _ = make_optimizer(dataclasses.replace(PLAIN, first_moment_dtype="bfloat16"), 10)
    state = tx.init({"kernel": jnp.zeros(3)})
    assert optax.tree.get(state, "mu")["kernel"].dtype == jnp.bfloat16
    assert optax.tree.get(state, "nu")["kernel"].dtype == jnp.float32
