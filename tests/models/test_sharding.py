"""On any mesh the numbers are those of one device."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch, place_tree
from capjax.models import Captioner

SHAPES = [
    MeshShape(data=8),
    MeshShape(data=1, fsdp=8),
    MeshShape(data=1, tensor=2, fsdp=4),
    MeshShape(data=2, fsdp=2, tensor=2),
]


@pytest.fixture(scope="module")
def single(config, params, batch, loss_and_gradient):
    return loss_and_gradient(config, params, batch)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_on_a_mesh(
    shape, single, config, params, batch, loss_and_gradient, assert_trees_close
):
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        placed = place_tree(mesh, params, Captioner(config).param_specs())
        found = loss_and_gradient(config, placed, place_batch(mesh, jax.device_get(batch)))
    assert_trees_close(found, single, 5e-6)


def test_initial_parameters_do_not_depend_on_the_mesh(config, assert_trees_close):
    model = Captioner(config)
    want = model.init(jax.random.key(3))
    with jax.set_mesh(make_mesh(MeshShape(data=2, fsdp=2, tensor=2))):
        found = model.init(jax.random.key(3))
    specs = jax.tree.map(lambda x: x.sharding.spec, found)
    assert specs == model.param_specs()
    assert_trees_close(found, want, 1e-6)


def test_every_large_parameter_is_split_over_fsdp(config):
    specs = Captioner(config).param_specs()
    shapes = Captioner(config).abstract_params()
    for (path, x), spec in zip(
        jax.tree.leaves_with_path(shapes), jax.tree.leaves(specs), strict=True
    ):
        if x.ndim > 1 and "bias" not in jax.tree_util.keystr(path):
            assert "fsdp" in spec or "norm" in jax.tree_util.keystr(path), (path, spec)


def test_sizes_that_do_not_divide_are_refused(config):
    model = Captioner(dataclasses.replace(config, width=36))
    with (
        jax.set_mesh(make_mesh(MeshShape(data=1, fsdp=8))),
        pytest.raises(UserError, match=r"mesh\.fsdp=8 does not divide an axis of size 36"),
    ):
        model.init(jax.random.key(0))


def test_one_layer_is_gathered_at_a_time(config):
    """Kernels gathered over `fsdp` are not kept for the backward pass."""
    depth, width = 16, 64
    model = Captioner(
        dataclasses.replace(config, width=width, mlp_dim=4 * width, depth=depth, decoder_depth=1)
    )
    gathered_bytes = depth * 12 * width**2 * 4

    def loss(params, images):
        return model.encode(params, images).sum()

    mesh = make_mesh(MeshShape(data=1, fsdp=8))
    with jax.set_mesh(mesh):
        shapes = jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
            ),
            model.abstract_params(),
            model.param_specs(),
        )
        images = place_batch(mesh, {"x": np.zeros((8, 8, 8, 3), np.float32)})["x"]
        compiled = jax.jit(jax.grad(loss)).lower(shapes, images).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.7 * gathered_bytes
