"""The state is laid out as the parameters are, and depends on the seed alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from capjax.mesh import MeshShape, make_mesh, out_sharding
from capjax.training.optimizer import OptimizerConfig, make_optimizer
from capjax.training.state import TrainState, init_state

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
