"""What the options of the image encoder do; their defaults are the captioner's, tested there."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.models import TwoTowers, TwoTowersConfig
from capjax.models.image_encoder import ImageEncoderConfig, normalize
from capjax.models.pooling import pool

PATCHES = 4


SIZES: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 24,
}


def make(**fields) -> TwoTowers:
    """Two towers, for their image encoder."""
    return TwoTowers(TwoTowersConfig(**SIZES | {"vocab_size": 8, "text_length": 3} | fields))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((3, 8, 8, 3)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    """Of an encoder with class token and two registers; the other encoders read a part of them."""
    params = make(pool="tok", num_registers=2, pre_norm=True).init(jax.random.key(0))
    noise = jax.random.key(1)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(noise, x.shape), params)


def with_encoder(params, **entries):
    return params | {"encoder": params["encoder"] | entries}


def without(params, *names):
    encoder = {name: x for name, x in params["encoder"].items() if name not in names}
    return params | {"encoder": encoder}


def test_a_register_beside_the_patches_is_what_a_class_token_is(params, images):
    tokens = params["encoder"]["class_token"]
    base = without(params, "class_token", "registers", "pre_norm")
    classed = make(pool="tok").encode(with_encoder(base, class_token=tokens), images)
    register = make(num_registers=1).encode(with_encoder(base, registers=tokens), images)
    plain = make().encode(base, images)
    assert classed.shape == register.shape == (3, PATCHES + 1, 16)
    np.testing.assert_array_equal(classed, register)
    assert np.abs(classed[:, :PATCHES] - plain).max() > 0.01


@pytest.mark.parametrize(
    ("fields", "length"),
    [({}, 4), ({"pool": "tok"}, 5), ({"num_registers": 3}, 7), ({"pool": "map"}, 4)],
)
def test_length_of_the_output(fields, length, images):
    model = make(**fields)
    memory = jax.eval_shape(model.encode, model.abstract_params(), images)
    assert model.config.memory_length == memory.shape[1] == length
    assert model.config.num_patches == PATCHES


def test_features(params, images):
    model = make(pool="tok", num_registers=2)
    memory = model.encode(without(params, "pre_norm"), images)
    np.testing.assert_array_equal(pool(memory, model.config), memory[:, PATCHES])
    mean = dataclasses.replace(model.config, pool="gap")
    np.testing.assert_allclose(pool(memory, mean), memory[:, :PATCHES].mean(1), rtol=1e-6)
    with pytest.raises(UserError, match="pool='map' has a head, which this model lacks"):
        pool(memory, dataclasses.replace(model.config, pool="map"))


def test_pre_norm_forgets_the_scale_of_what_is_embedded(params, images):
    """The embedded patches, all tokens among them, times 100: the same output."""
    names = ("patch_embedding", "position_embedding", "class_token", "registers")
    scaled = {name: jax.tree.map(lambda x: 100 * x, params["encoder"][name]) for name in names}
    model = make(pool="tok", num_registers=2, pre_norm=True)
    want = model.encode(params, images)
    found = model.encode(with_encoder(params, **scaled), images)
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)
    plain = make(pool="tok", num_registers=2)
    assert np.abs(plain.encode(without(params, "pre_norm"), images) - want).max() > 0.1


def outputs(model, params, images):
    """Of the three towers, the pooling head reading a memory that no encoder has been at."""
    memory = images.reshape(3, 12, 16)
    text = model.embed_text(params, jnp.array([[2, 3, 1], [4, 5, 1], [6, 7, 1]]))
    return model.encode(params, images)[:, 0], model.pooled(params, memory), text


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_activations_reach_every_tower(activation, images):
    base, other = make(pool="map"), make(pool="map", activation=activation)
    params = base.init(jax.random.key(2))
    for x, y in zip(outputs(base, params, images), outputs(other, params, images), strict=True):
        assert 1e-6 < np.abs(x - y).max() < 0.5


def test_eps_reaches_every_norm(images):
    """A very large one leaves of each LayerNorm its bias, as a scale of zero does."""
    fields = {"pool": "map", "pre_norm": True, "qk_norm": True}
    params = make(**fields).init(jax.random.key(2))
    noise = jax.random.key(1)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(noise, x.shape), params)

    def without_scale(path, x):
        return 0 * x if path[-1].key == "scale" else x

    def states(model, params):
        """What the final norms of image and text are given, and what the three towers give."""
        module, given = model.module(params), []
        for tower in (module.encoder, module.text_encoder):
            tower.norm = lambda x, norm=tower.norm: norm(given.append(x) or x)
        module.encoder(images)
        module.text_encoder(jnp.array([[2, 3, 1]]))
        return *given, *outputs(model, params, images)

    found = states(make(norm_eps=1e30, **fields), params)
    want = states(make(**fields), jax.tree.map_with_path(without_scale, params))
    assert len(found) == 5
    for x, y in zip(found, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_qk_norm_has_scales(params):
    model = make(qk_norm=True)
    attention = model.abstract_params()["encoder"]["blocks"]["attention"]
    assert attention["query_norm"]["scale"].shape == (2, 8)
    assert model.num_params() - make().num_params() == 2 * 2 * 2 * 8  # towers, layers, q and k


def test_laws_of_the_tokens():
    encoder = make(width=1024, num_registers=4, pool="tok").init(jax.random.key(0))["encoder"]
    for name in ("class_token", "registers"):
        assert np.std(encoder[name]) == pytest.approx(1 / 32, rel=0.1)


def test_normalisation():
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    config = make(image_mean=mean, image_std=std).config
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)), jnp.uint8)
    want = (np.asarray(pixels) / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalize(pixels, config), want, rtol=1e-5, atol=1e-6)
    by_default = normalize(pixels, make().config)
    np.testing.assert_array_equal(by_default, pixels.astype(jnp.float32) / 127.5 - 1)


def test_lists_become_tuples():
    """What JSON gives back hashes and compares like what was written."""
    config = make(image_mean=(0.1, 0.2, 0.3)).config
    assert dataclasses.replace(config, image_mean=[0.1, 0.2, 0.3]) == config
    assert hash(config) == hash(dataclasses.replace(config, image_std=[0.5, 0.5, 0.5]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pool": "cls"}, "pool='cls': choose one of"),
        ({"activation": "relu"}, "activation='relu': choose one of .*'quick_gelu'"),
        ({"attention": "flash"}, "attention='flash': choose one of"),
        ({"num_registers": -1}, "num_registers=-1: expected 0 or more"),
        ({"norm_eps": 0.0}, "norm_eps=0.0: expected a number above 0"),
        ({"image_mean": (0.5,)}, "image_mean=.*: expected one number a channel"),
        ({"image_std": (0.5, 0.0, 0.5)}, "image_std=.*: expected one number above 0 a channel"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ImageEncoderConfig(**SIZES | fields)
