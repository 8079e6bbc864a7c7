"""Durations, and schedules in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.training.schedule import ScheduleConfig, duration, learning_rate_schedule

SIZES = {"batch_size": 32, "num_examples": 1000}


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
    config = ScheduleConfig(learning_rate=0.5, schedule=schedule, **fields)
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
    with pytest.raises(UserError, match="more than total_steps=10"):
        learning_rate_schedule(ScheduleConfig(warmup_steps=8, cooldown_steps=3), 10)
    with pytest.raises(UserError, match="total_steps=0"):
        learning_rate_schedule(ScheduleConfig(), 0)
