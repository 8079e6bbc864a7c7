"""The state is laid out as the parameters are, and depends on the seed alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from capjax.mesh import MeshShape, make_mesh, out_sharding
from capjax.training.optimizer import OptimizerConfig, make_optimizer
from capjax.training.state import TrainState, init_state, update_ema, with_params

SPECS = {"kernel": P("fsdp", "tensor"), "scale": P(), "blocks": {"kernel": P(None, "tensor")}}
SHAPES = {"kernel": (8, 4), "scale": (8,), "blocks": {"kernel": (3, 4)}}
TX, _ = make_optimizer(OptimizerConfig(first_moment_dtype="bfloat16"), 10)


def init_params(key):
    def init(shape, spec):
        return jax.random.normal(key, shape, out_sharding=out_sharding(spec))

    return jax.tree.map(init, SHAPES, SPECS, is_leaf=lambda x: isinstance(x, tuple))


def init(seed=0):
    return init_state(init_params, TX, seed)


def moments(state: TrainState):
    return [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), (1, 1, 4, 2)])
def test_moments_are_split_as_their_parameters(shape):
    with jax.set_mesh(make_mesh(MeshShape(*shape))):
        state, abstract = jax.jit(init)(), jax.eval_shape(init)
    assert jax.typeof(state.params["kernel"]).sharding.spec == SPECS["kernel"]
    params = jax.tree.leaves(state.params)
    assert len(moments(state)) == 2 * len(params)
    for moment, param in zip(moments(state), 2 * params, strict=True):
        assert moment.shape == param.shape
        assert moment.sharding == param.sharding
        assert moment.is_fully_replicated == param.is_fully_replicated
    for concrete, shaped in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert shaped.sharding.spec == jax.typeof(concrete).sharding.spec


def test_the_seed_alone_decides():
    alone = jax.jit(init)()
    assert alone.step == 0 and alone.step.dtype == jnp.int32
    with jax.set_mesh(make_mesh(MeshShape(fsdp=4, tensor=2))):
        traced = jax.jit(init)  # one program for all seeds
        same, other = traced(0), traced(1)
    for x, y in zip(jax.tree.leaves(alone.params), jax.tree.leaves(same.params), strict=True):
        # Two programs, of which one folds the seed in: jax 0.12 rounds them differently.
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
    assert (jax.random.key_data(alone.key) == jax.random.key_data(same.key)).all()
    assert not (jax.random.key_data(other.key) == jax.random.key_data(same.key)).all()
    assert not np.array_equal(other.params["kernel"], same.params["kernel"])


def test_the_average_in_closed_form():
    average, expected = {"x": jnp.array([1.0, -2.0])}, np.array([1.0, -2.0])
    update = jax.jit(update_ema, static_argnums=2)
    for step, value in enumerate([3.0, 0.5, -1.0, 7.0]):
        params = {"x": jnp.full(2, value)}
        average = update(average, params, 0.3, step)
        decay = min(0.3, (1 + step) / (10 + step))  # 1/10, 2/11, 3/12, then 0.3
        expected = decay * expected + (1 - decay) * value
        np.testing.assert_allclose(average["x"], expected, rtol=1e-6)


def test_the_average_of_what_does_not_move_does_not_move():
    values = {"x": jax.random.normal(jax.random.key(0), (1000,))}
    average = update_ema(values, values, 0.999, 100)
    np.testing.assert_array_equal(average["x"], values["x"])


def test_a_state_with_an_average_is_its_own_memory():
    """A step donates all of it, so that nothing may be there twice."""
    with jax.set_mesh(make_mesh(MeshShape(fsdp=4, tensor=2))):
        state = jax.jit(lambda: init_state(init_params, TX, 0, ema=True))()
        other = with_params(jax.tree.map(jnp.copy, state), jax.jit(init_params)(jax.random.key(5)))
        pass_on = jax.jit(lambda state: jax.tree.map(lambda x: x, state), donate_argnums=0)
        for moved in (pass_on(state), pass_on(other)):
            jax.tree.map(np.testing.assert_array_equal, moved.ema, moved.params)
            for average, param in zip(
                *map(jax.tree.leaves, (moved.ema, moved.params)), strict=True
            ):
                assert average.sharding == param.sharding
    assert init().ema is None
