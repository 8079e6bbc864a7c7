"""One AdamW step by hand, the decay mask, frozen parameters, what configs are refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capjax.errors import UserError
from capjax.training.optimizer import OptimizerConfig, is_decayed, make_optimizer

PLAIN = OptimizerConfig(
    learning_rate=0.1, schedule="constant", grad_clip_norm=0.0, weight_decay=0.0
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "cosin"),
        ("first_moment_dtype", "float16"),
        ("b1", 1.0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", -0.1),
        ("name", "adam"),
        ("momentum", 1.0),
        ("ema_decay", 1.0),
        ("layer_decay", 0.0),
        ("second_moment_dtype", "bfloat16"),
        ("warmup_steps", -1),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(UserError, match=f"optimizer.{field}="):
        OptimizerConfig(**{field: value})


def test_decay_falls_on_kernels_alone():
    names = {"blocks/mlp/kernel": True, "kernel": True, "blocks/bias": False, "kernel_size": False}
    assert is_decayed(names) == names


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


def test_a_norm_that_is_given_is_the_one_that_is_clipped():
    params, grads = {"bias": jnp.zeros(2)}, {"bias": jnp.array([3.0, 4.0])}
    tx, _ = make_optimizer(dataclasses.replace(PLAIN, grad_clip_norm=1.0, b1=0.0), 10)
    _, state = tx.update(grads, tx.init(params), params, gradient_norm=jnp.float32(10))
    np.testing.assert_allclose(optax.tree.get(state, "mu")["bias"], [0.3, 0.4], rtol=1e-6)


def test_the_first_moment_may_be_bfloat16():
    tx, _ = make_optimizer(dataclasses.replace(PLAIN, first_moment_dtype="bfloat16"), 10)
    state = tx.init({"kernel": jnp.zeros(3)})
    assert optax.tree.get(state, "mu")["kernel"].dtype == jnp.bfloat16
    assert optax.tree.get(state, "nu")["kernel"].dtype == jnp.float32


def test_a_second_moment_in_bfloat16_rises_and_falls():
    config = dataclasses.replace(PLAIN, second_moment_dtype="bfloat16", b2=0.99)
    tx, _ = make_optimizer(config, 10)
    params = {"kernel": jnp.zeros(1)}
    state, expected = tx.init(params), 0.0
    update = jax.jit(tx.update)
    for gradient in [1.0] * 60 + [0.0] * 60:
        _, state = update({"kernel": jnp.array([gradient])}, state, params)
        moment = optax.tree.get(state, "nu")["kernel"]
        expected = 0.99 * expected + 0.01 * gradient**2
        assert moment.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(moment, np.float32), expected, rtol=0.15)


def test_fields_of_other_optimizers_are_refused():
    with pytest.raises(UserError) as error:
        OptimizerConfig(name="big_vision_adafactor", eps=1e-6)
    assert str(error.value) == (
        "optimizer.eps=1e-06 is not used by optimizer.name='big_vision_adafactor', only by adamw, "
        "muon; leave it at 1e-08"
    )
    with pytest.raises(UserError, match=r"optimizer.momentum=0.9 is not used"):
        OptimizerConfig(momentum=0.9)
    OptimizerConfig(name="muon", momentum=0.9, eps=1e-6)


def test_multipliers_that_stop_are_refused():
    with pytest.raises(UserError, match=r"optimizer.freeze holds parameters fast"):
        OptimizerConfig(multipliers=(("encoder", 0.0),))
