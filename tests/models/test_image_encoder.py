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


@pytest.mark.parametrize(
    "fields",
    [{"activation": "gelu"}, {"activation": "quick_gelu"}, {"norm_eps": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("part", ["image", "pooled", "text"])
def test_numerics_reach_every_tower(fields, part, images):
    """Of small parameters the outputs differ a little, of the same ones not at all."""
    base, other = make(pool="map"), make(pool="map", **fields)
    params = base.init(jax.random.key(2))

    def output(model):
        if part == "text":
            return model.embed_text(params, jnp.array([[2, 3, 1]]))
        # Pooling of a fixed memory, so that the head alone can make the difference.
        return (
            model.encode(params, images) if part == "image" else model.pooled(params, images[:, 0])
        )

    images = images.reshape(3, 4, 3, 16) if part == "pooled" else images
    assert 1e-6 < np.abs(output(base) - output(other)).max() < 0.5


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
