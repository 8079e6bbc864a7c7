"""Vectors of the published estimators, and what must hold of any of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.objectives.policy_gradient import (
    ALGORITHMS,
    PolicyGradient,
    advantages,
    divergence,
    next_kl_weight,
    preference_loss,
    surrogate,
    token_weights,
)

REWARDS = jnp.array([[1.0, 2.0, 3.0, 6.0]])
ONE = jnp.ones(1, bool)


def policy(name, **fields):
    return PolicyGradient(**{**ALGORITHMS[name], **fields})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rloo", [-2.6667, -1.3333, 0, 4]),
        ("grpo", [-0.92582, -0.46291, 0, 1.38873]),
        ("dr_grpo", [-2, -1, 0, 3]),
        ("dapo", [-0.92582, -0.46291, 0, 1.38873]),
    ],
)
def test_advantages_are_those_published(name, expected):
    found = advantages(REWARDS, ONE, policy(name))
    np.testing.assert_allclose(found[0], expected, atol=5e-5)


def test_greedy_and_running_baselines():
    greedy = advantages(REWARDS, ONE, policy("scst"), greedy_B=jnp.array([2.0]))
    np.testing.assert_array_equal(greedy[0], [-1, 0, 1, 4])
    running = advantages(REWARDS, ONE, policy("reinforce"), running_mean=jnp.float32(1.5))
    np.testing.assert_array_equal(running[0], [-0.5, 0.5, 1.5, 4.5])


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo", "dapo", "gspo"])
def test_equal_rewards_give_exactly_nothing(name):
    constant = jnp.full((3, 7), 0.1)
    assert not np.any(advantages(constant, jnp.ones(3, bool), policy(name)))


def test_leave_one_out_is_the_mean_of_the_others():
    rewards = jax.random.normal(jax.random.key(0), (6, 5))
    found = advantages(rewards, jnp.ones(6, bool), policy("rloo"))
    others = [[row.sum() - x for x in row] for row in np.asarray(rewards, np.float64)]
    np.testing.assert_allclose(found, rewards - np.array(others) / 4, atol=1e-6)


def test_whitened_advantages_leave_out_what_fills_the_batch():
    rewards = jax.random.normal(jax.random.key(1), (4, 3)) * 5 + 2
    mask = jnp.array([True, True, True, False])
    found = np.asarray(advantages(rewards, mask, policy("rloo", whiten=True)))
    assert not found[3].any()
    np.testing.assert_allclose([found[:3].mean(), found[:3].std()], [0, 1], atol=1e-5)
    other = rewards.at[3].set(1e6)
    np.testing.assert_array_equal(found, advantages(other, mask, policy("rloo", whiten=True)))


def test_a_floor_keeps_near_ties_small():
    rewards = jnp.array([[1.0, 1.0 + 1e-4]])
    free = advantages(rewards, ONE, policy("grpo", std_floor=0.0))
    held = advantages(rewards, ONE, policy("grpo", std_floor=0.1))
    assert abs(free).max() > 0.5 and abs(held).max() < 1e-3


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.5, 1.0, -1.2), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8)],
)
def test_ppo_clip(ratio, advantage, expected):
    now = jnp.log(jnp.full((1, 1, 1), ratio))
    cost, found, is_clipped = surrogate(
        now, jnp.zeros((1, 1, 1)), jnp.full((1, 1), advantage), jnp.ones((1, 1, 1), bool),
        policy("ppo"),
    )  # fmt: skip
    np.testing.assert_allclose([cost.item(), found.item()], [expected, ratio], rtol=1e-6)
    # Clipping holds a token where it leaves no gradient.
    assert bool(is_clipped.item()) == (abs(expected) != ratio)


def test_scst_gradient():
    """Rennie et al.: the gradient in the logits is A (softmax - onehot)."""

    def loss(logits_V):
        logprob = jax.nn.log_softmax(logits_V)[1][None, None, None]
        cost, _, _ = surrogate(
            logprob,
            jax.lax.stop_gradient(logprob),
            jnp.full((1, 1), 0.5),
            jnp.ones((1, 1, 1), bool),
            policy("scst"),
        )
        return jnp.sum(cost)

    np.testing.assert_allclose(
        jax.grad(loss)(jnp.zeros(3)), [0.166667, -0.333333, 0.166667], atol=1e-6
    )


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.106531)])
def test_divergences(estimator, expected):
    found = divergence(jnp.float32(-1.0), jnp.float32(-1.5), estimator)
    assert found.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_divergences_are_unbiased(estimator):
    """Weighed by the policy they sum to KL(policy || reference)."""
    p, q = jax.nn.softmax(jax.random.normal(jax.random.key(2), (2, 9)), -1)
    mean = jnp.sum(p * divergence(jnp.log(p), jnp.log(q), estimator))
    assert mean.item() == pytest.approx(jnp.sum(p * jnp.log(p / q)).item(), abs=1e-6)


def test_dpo():
    loss, counts = preference_loss(
        jnp.array([[0.5, 2.0, -1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]),
        jnp.array([[0.2, 0.9, 0.1], [0.3, 0.3, 0.3], [0.1, 0.2, 0.3]]),
        jnp.array([True, True, False]),
        0.1,
    )
    np.testing.assert_allclose(loss, [0.554355, 0, 0], atol=1e-6)
    assert counts.tolist() == [True, False, False]


def test_aggregations():
    """Of captions of 2, 1 and 3 tokens, of two images of which the second lacks one caption."""
    mask = jnp.array([[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 0], [0, 0, 0, 0]]], bool)
    values = jnp.arange(16.0).reshape(2, 2, 4)
    tokens = [[0, 1], [4], [8, 9, 10]]
    expected = {
        "token_mean": np.mean([0, 1, 4, 8, 9, 10]),
        "sequence_mean_token_mean": np.mean([np.mean(x) for x in tokens]),
        "sequence_mean_token_sum": np.mean([np.sum(x) for x in tokens]),
        "sequence_mean_token_scale": np.mean([np.sum(x) / 4 for x in tokens]),
    }
    for name, value in expected.items():
        found = jnp.mean(jnp.sum(token_weights(mask, name) * values, (1, 2)))
        assert found.item() == pytest.approx(value), name


def test_the_weight_of_the_divergence_moves_towards_its_target():
    weight = jnp.float32(0.1)
    for kl, factor in ((10.0, 1.02), (0.0, 0.98), (2.2, 1.01)):
        found = next_kl_weight(weight, jnp.float32(kl), 2.0)
        assert found.item() == pytest.approx(0.1 * factor, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"baseline": "mean"}, "choose one of"),
        ({"aggregation": "sum"}, "choose one of"),
        ({"clip_high": 0.2}, "both"),
        ({"kl_weight": 0.1, "kl_estimator": "k1"}, "kl_in_reward"),
        ({"kl_target": 1.0}, "kl_weight"),
        ({"entropy_weight": -1.0}, "0 or more"),
        ({"scale_by_std": True, "baseline": "greedy"}, "group_mean"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, word):
    with pytest.raises(UserError, match=word):
        PolicyGradient(**fields)
