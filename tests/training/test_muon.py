"""Muon: every matrix of a stacked and fused kernel by itself, the rest by Adam, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from optax import contrib

from capjax.mesh import MeshShape, make_mesh, place_tree
from capjax.training.layout import layouts
from capjax.training.muon import scale_by_muon

SPECS = {
    "encoder/blocks/attention/qkv/kernel": P(None, "fsdp", "tensor", None, None),
    "encoder/blocks/attention/out/kernel": P(None, "tensor", None, "fsdp"),
    "encoder/blocks/mlp/up/kernel": P(None, "fsdp", "tensor"),
    "encoder/blocks/mlp/up/bias": P(None, "tensor"),
    "encoder/patch_embedding/kernel": P(None, None, None, "fsdp"),
    "decoder/head/kernel": P("fsdp", "tensor"),
    "decoder/token_embedding/embedding": P("tensor", "fsdp"),
    "text_encoder/projection/kernel": P("fsdp", "tensor"),
}
SHAPES = {
    "encoder/blocks/attention/qkv/kernel": (2, 16, 4, 3, 8),
    "encoder/blocks/attention/out/kernel": (2, 4, 8, 16),
    "encoder/blocks/mlp/up/kernel": (2, 16, 24),
    "encoder/blocks/mlp/up/bias": (2, 24),
    "encoder/patch_embedding/kernel": (2, 2, 3, 16),
    "decoder/head/kernel": (16, 8),
    "decoder/token_embedding/embedding": (8, 16),
    "text_encoder/projection/kernel": (16, 8),
}
QKV, OUT, UP = list(SHAPES)[:3]


def random(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in SHAPES.items()}


GRADIENTS = [random(1), random(2)]
ADAM = optax.scale_by_adam()
TX = scale_by_muon(layouts(random(0), {}), ADAM, momentum=0.9, momentum_dtype="float32")


def updates_of(tx, gradients):
    """What becomes of each of the gradients."""
    state, updates = jax.jit(tx.init)(gradients[0]), []
    for gradient in gradients:
        update, state = jax.jit(tx.update)(gradient, state)
        updates.append(update)
    return updates


@pytest.fixture(scope="module")
def alone():
    return updates_of(TX, GRADIENTS)[-1]


def matrices(arrays: dict) -> dict:
    """Each layer's each matrix, as (in, out)."""
    return {
        **{f"{QKV}{x}{i}": arrays[QKV][x, :, :, i].reshape(16, 32) for x, i in np.ndindex(2, 3)},
        **{f"{OUT}{x}": arrays[OUT][x].reshape(32, 16) for x in range(2)},
        **{f"{UP}{x}": arrays[UP][x] for x in range(2)},
    }


def test_every_matrix_is_orthogonalised_by_itself(alone):
    gradients = [matrices(g) for g in GRADIENTS]
    plain = {name: contrib.MuonDimensionNumbers() for name in gradients[0]}
    tx = contrib.scale_by_muon(beta=0.9, weight_dimension_numbers=plain)
    reference = updates_of(tx, gradients)[-1]
    for name, update in matrices(alone).items():
        longer = max(update.shape)
        np.testing.assert_allclose(update, 0.2 * longer**0.5 * reference[name], atol=2e-4)
        sizes = np.linalg.svd(np.asarray(update) / (0.2 * longer**0.5), compute_uv=False)
        assert sizes.min() > 0.5 and sizes.max() < 1.3  # five steps of Newton-Schulz get so far
        rms = float(jnp.sqrt(jnp.mean(update**2)))
        assert 0.1 < rms < 0.25, name  # as AdamW's


def test_the_rest_goes_to_adam(alone):
    hidden = {QKV, OUT, UP}
    state = jax.eval_shape(TX.init, random(0))
    assert state.muon.mu.keys() == hidden and state.adam.nu.keys() == SHAPES.keys() - hidden
    rest = [{n: x for n, x in g.items() if n not in hidden} for g in GRADIENTS]
    for name, update in updates_of(ADAM, rest)[-1].items():
        np.testing.assert_allclose(alone[name], update, rtol=1e-6)


def test_every_mesh_gives_the_same(alone):
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        split = updates_of(TX, [place_tree(mesh, g, SPECS) for g in GRADIENTS])[-1]
    for name, update in split.items():
        np.testing.assert_allclose(update, alone[name], atol=1e-4)
        assert update.sharding.spec == SPECS[name]
