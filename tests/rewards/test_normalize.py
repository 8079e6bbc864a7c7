"""Normalised rewards: by hand, equal rewards, rows that fill the batch, a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch
from capjax.rewards.normalize import KINDS, normalize

REWARD = np.random.default_rng(0).normal(-3, 2, (8, 4)).astype(np.float32)
MASK = np.array([1, 1, 1, 0, 1, 1, 0, 1], bool)


def by_hand(kind, reward_BK):
    if kind == "none":
        return reward_BK
    axis = 1 if kind == "group" else None
    mean = reward_BK.mean(axis, keepdims=True)
    return (reward_BK - mean) / reward_BK.std(axis, keepdims=True)


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand_without_the_rows_that_fill_the_batch(kind):
    expected = np.zeros_like(REWARD)
    expected[MASK] = by_hand(kind, REWARD[MASK].astype(np.float64))
    spoilt = np.where(MASK[:, None], REWARD, 1e6)
    compiled = jax.jit(functools.partial(normalize, kind=kind))
    found = compiled(jnp.asarray(spoilt), mask_B=jnp.asarray(MASK))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    mesh = make_mesh(MeshShape(data=4, fsdp=2))
    with jax.set_mesh(mesh):
        rows = place_batch(mesh, {"reward": spoilt, "mask": MASK})
        np.testing.assert_allclose(compiled(rows["reward"], mask_B=rows["mask"]), found, atol=1e-6)


@pytest.mark.parametrize("kind", ["batch", "group"])
@pytest.mark.parametrize("value", [0.1, -1.7, 1e4 / 3])
def test_equal_rewards_are_0_exactly(kind, value):
    same = jnp.full((7, 5), value)
    np.testing.assert_array_equal(normalize(same, kind=kind, floor=1e-12), 0)
    np.testing.assert_array_equal(normalize(same, kind, jnp.arange(7) < 3, floor=1e-12), 0)
    np.testing.assert_array_equal(normalize(same, kind, jnp.zeros(7, bool)), 0)


def test_each_image_is_its_own_group():
    reward = jnp.array([[1.0, 3.0], [5.0, 5.0], [10.0, 30.0]])
    np.testing.assert_allclose(normalize(reward, kind="group"), [[-1, 1], [0, 0], [-1, 1]])


def test_nearly_equal_rewards_stay_near():
    found = normalize(jnp.array([[1.0, 1.0002]]), kind="group", floor=0.1)
    np.testing.assert_allclose(found, [[-0.001, 0.001]], rtol=1e-2)


def test_what_is_wrong_is_said():
    with pytest.raises(UserError, match=r"normalize='mean': choose one of none, batch, group"):
        normalize(jnp.ones((2, 2)), kind="mean")
    with pytest.raises(UserError, match=r"floor=0.0: expected more than 0"):
        normalize(jnp.ones((2, 2)), floor=0.0)
