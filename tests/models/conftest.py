"""A tiny captioner with unequal widths, a batch for it, and a loss with a gradient everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.mesh import act_BLV, reshard
from capjax.models import Captioner, CaptionerConfig


@pytest.fixture(scope="package")
def config() -> CaptionerConfig:
    return CaptionerConfig(
        image_size=8,
        patch_size=4,
        width=32,
        depth=2,
        num_heads=4,
        mlp_dim=48,
        decoder_width=16,
        decoder_depth=3,
        decoder_num_heads=2,
        decoder_mlp_dim=32,
        decoder_bias=True,
        vocab_size=21,
        text_length=6,
    )


@pytest.fixture(scope="package")
def batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    rows = {
        "image": rng.integers(0, 256, (8, 8, 8, 3), np.uint8),
        "tokens": rng.integers(0, 22, (8, 6)).astype(np.int32),
        "labels": rng.integers(0, 21, (8, 6)).astype(np.int32),
        "is_parallel": rng.random(8) < 0.5,
    }
    return jax.tree.map(jnp.asarray, rows)


def random_params(config: CaptionerConfig) -> dict:
    """Initial parameters plus noise, so that neither the head nor a bias is zero."""

    def noisy(x, key):
        return x + 0.1 * jax.random.normal(key, x.shape)

    params = Captioner(config).init(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(treedef, map(noisy, leaves, keys))


@pytest.fixture(scope="package")
def params(config) -> dict:
    return random_params(config)


@pytest.fixture(scope="package")
def loss_and_gradient():
    """`loss_and_gradient(config, params, batch)` in one jit; a mesh may be set."""

    def compute(config, params, batch):
        model = Captioner(config)

        def loss(params, batch):
            patches = model.encode(params, batch["image"])
            hidden = model.hidden(params, batch["tokens"], patches, batch["is_parallel"])
            logits_BLV = model.logits(params, hidden)
            labels_BLV = reshard(jax.nn.one_hot(batch["labels"], logits_BLV.shape[-1]), act_BLV)
            nll_BL = jax.nn.logsumexp(logits_BLV, -1) - jnp.sum(logits_BLV * labels_BLV, -1)
            return jnp.mean(nll_BL)

        return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, batch))

    return compute


@pytest.fixture(scope="package")
def assert_trees_close():
    """Leaf by leaf, relative to the largest entry of the leaf."""

    def check(found, want, tolerance):
        assert jax.tree.structure(found) == jax.tree.structure(want)
        for (path, a), b in zip(
            jax.tree.leaves_with_path(found), jax.tree.leaves(want), strict=True
        ):
            error = np.max(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)))
            assert error <= tolerance * (1e-3 + np.max(np.abs(b))), (
                jax.tree_util.keystr(path),
                error,
            )

    return check
