"""FLOPs counted in a traced program against closed forms."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from capjax.mesh import BATCH, MeshShape, act_BD, kernel_DF, make_mesh, reshard
from capjax.planning.flops import count_flops

B, D, N = 8, 16, 5
PRODUCT = 2 * B * D * D


def flops(function, *shapes, unknown_trips=0):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_flops(jax.jit(function).trace(*arrays).jaxpr, unknown_trips)


def layers(x, kernels, body=lambda x, kernel: jnp.tanh(x @ kernel)):
    return lax.scan(lambda x, kernel: (body(x, kernel), None), x, kernels)[0].sum()


@jax.custom_vjp
def square(x, kernel):
    return x @ kernel


square.defvjp(
    lambda x, kernel: (x @ kernel, (x, kernel)),
    lambda saved, slope: (slope @ saved[1].T, saved[0].T @ slope),
)


def test_a_batched_product():
    assert flops(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), (3, 4, 5), (3, 5, 6)) == 720


def test_a_convolution_of_groups():
    def convolve(x, kernel):
        return lax.conv_general_dilated(x, kernel, (2, 2), "VALID", feature_group_count=2)

    # 4 x 4 outputs of 6 channels, each of 2 x 2 pixels of the 2 channels of its group.
    assert flops(convolve, (3, 4, 8, 8), (6, 2, 2, 2)) == 2 * 3 * 16 * 6 * 4 * 2


@pytest.mark.parametrize(
    ("body", "products"),
    [
        (lambda x, kernel: jnp.tanh(x @ kernel), 3),
        (jax.checkpoint(lambda x, kernel: jnp.tanh(x @ kernel)), 4),
        (square, 3),
    ],
    ids=["scan", "remat", "custom_vjp"],
)
def test_forward_and_backward_of_a_scan(body, products):
    gradients = jax.grad(functools.partial(layers, body=body), argnums=(0, 1))
    assert flops(gradients, (B, D), (N, D, D)) == products * N * PRODUCT


def test_loops_without_known_trips_and_branches():
    def loop(x, kernel, n):
        return lax.fori_loop(0, n[0].astype(int), lambda _, x: x @ kernel, x)

    assert flops(loop, (B, D), (D, D), (1,), unknown_trips=7) == 7 * PRODUCT

    def branch(x, kernel):
        return lax.cond(x[0, 0] > 0, lambda x: x @ kernel @ kernel, lambda x: x @ kernel, x)

    assert flops(branch, (B, D), (D, D)) == 2 * PRODUCT


def test_each_device_of_a_mesh_counts_its_share():
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=jax.NamedSharding(mesh, act_BD))
        kernel = jax.ShapeDtypeStruct(
            (D, D), jnp.float32, sharding=jax.NamedSharding(mesh, kernel_DF)
        )

        def split(x, kernel):
            return x @ reshard(kernel, P(None, "tensor"))

        def repeated(x, kernel):
            return x @ reshard(kernel, P(None, None))

        def manual(x, kernel):
            part = jax.shard_map(lambda x, y: x @ y, in_specs=(act_BD, P()), out_specs=P(BATCH))
            return part(x, reshard(kernel, P()))

        for function, share in ((split, 8), (repeated, 4), (manual, 4)):
            counted = count_flops(jax.jit(function).trace(x, kernel).jaxpr, 0)
            assert counted == PRODUCT / share
