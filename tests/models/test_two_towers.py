"""Embeddings of images and texts: what they depend on, how they begin, and the same on any mesh."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.mesh import MeshShape, act_BD, make_mesh, place_batch, place_tree
from capjax.models import TwoTowers, TwoTowersConfig
from capjax.models.presets import variant

SIGLIP = TwoTowersConfig(
    image_size=8,
    patch_size=4,
    width=32,
    depth=2,
    num_heads=4,
    mlp_dim=48,
    pool="map",
    num_registers=2,
    vocab_size=21,
    text_length=6,
    text_width=16,
    text_depth=1,
    text_num_heads=2,
    text_mlp_dim=32,
    embedding_dim=24,
    image_projection=True,
)
CLIP = dataclasses.replace(
    SIGLIP,
    pool="tok",
    num_registers=0,
    qk_norm=True,
    activation="quick_gelu",
    norm_eps=1e-5,
    pre_norm=True,
    posemb="sincos2d",
    text_causal=True,
    text_pool="eos",
    text_projection_bias=False,
    logit_bias_init=None,
)
CONFIGS = {"siglip": SIGLIP, "clip": CLIP}


@pytest.fixture(scope="module")
def rows():
    """Eight images with two texts each; most texts end and are padded, one fills its length."""
    rng = np.random.default_rng(0)
    tokens_TL = rng.integers(2, 21, (16, 6)).astype(np.int32)
    for tokens_L, length in zip(tokens_TL, rng.integers(1, 7, 16), strict=True):
        tokens_L[length - 1] = 1
        tokens_L[length:] = 0
    tokens_TL[3] = np.arange(2, 8)
    return {"image": rng.integers(0, 256, (8, 8, 8, 3), np.uint8), "tokens": tokens_TL}


def random_params(config):
    """Initial parameters plus noise, so that no bias is zero."""
    params = TwoTowers(config).init(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


@pytest.fixture(scope="module")
def params():
    return {config: random_params(config) for config in CONFIGS.values()}


def embeddings_and_gradient(config, params, rows):
    """Embeddings, and gradients of a loss of pairs; a mesh may be set.

    There are two texts an image, so a text may lie on another device than its image.
    """
    model = TwoTowers(config)

    def loss(params, rows):
        image_BD = model.embed_image(params, model.encode(params, rows["image"]))
        text_TD = model.embed_text(params, rows["tokens"])
        scale, bias = model.logit_scale_and_bias(params)
        mean_BD = text_TD.reshape((8, 2, -1), out_sharding=jax.typeof(image_BD).sharding).mean(1)
        return jnp.mean(jax.nn.softplus(-scale * jnp.sum(image_BD * mean_BD, -1) - bias)), (
            image_BD,
            text_TD,
        )

    gradient, embeddings = jax.jit(jax.grad(loss, has_aux=True))(params, rows)
    return jax.device_get((embeddings, gradient))


@pytest.fixture(scope="module")
def single(params, rows):
    return {
        config: embeddings_and_gradient(config, params[config], jax.tree.map(jnp.asarray, rows))
        for config in CONFIGS.values()
    }


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("siglip", MeshShape(data=8)),
        ("siglip", MeshShape(data=1, fsdp=8)),
        ("siglip", MeshShape(data=1, fsdp=4, tensor=2)),
        ("siglip", MeshShape(data=2, fsdp=2, tensor=2)),
        ("clip", MeshShape(data=2, fsdp=2, tensor=2)),
    ],
    ids=str,
)
def test_on_a_mesh(name, shape, single, params, rows, assert_trees_close):
    config, mesh = CONFIGS[name], make_mesh(shape)
    with jax.set_mesh(mesh):
        placed = place_tree(mesh, params[config], TwoTowers(config).param_specs())
        found = embeddings_and_gradient(config, placed, place_batch(mesh, rows))
    assert_trees_close(found, single[config], 1e-5)


@pytest.mark.parametrize("fields", [{"remat": "full"}, {"scan": False, "remat": "dots"}], ids=str)
def test_scan_and_remat_change_nothing(fields, single, params, rows, assert_trees_close):
    config = dataclasses.replace(CLIP, **fields)
    rows = jax.tree.map(jnp.asarray, rows)
    found = embeddings_and_gradient(config, params[CLIP], rows)
    assert_trees_close(found, single[CLIP], 5e-6)


def test_bfloat16_is_close(single, params, rows, assert_trees_close):
    config = dataclasses.replace(SIGLIP, dtype="bfloat16")
    found = embeddings_and_gradient(config, params[SIGLIP], jax.tree.map(jnp.asarray, rows))
    for x in found[0]:
        assert x.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-5)
    assert_trees_close(found[0], single[SIGLIP][0], 0.05)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_embeddings_have_length_one_and_every_parameter_counts(config, single):
    (image_BD, text_TD), gradient = single[config]
    assert image_BD.shape == (8, 24) and text_TD.shape == (16, 24)
    for x in (image_BD, text_TD):
        np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-6)
    for path, x in jax.tree.leaves_with_path(gradient):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "token_embedding" in name:
            assert np.any(x[1:21]) and not np.any(x[21:])
        else:
            assert np.any(x), name


@pytest.fixture(scope="module")
def embed_text(params):
    """Texts' embeddings by the fields that differ from CLIP's."""

    def embed(tokens, **fields):
        model = TwoTowers(dataclasses.replace(CLIP, **fields))
        return np.asarray(model.embed_text(params[CLIP], jnp.asarray(tokens)))

    return embed


TEXTS = np.array([[5, 6, 1, 7, 8, 9], [5, 6, 1, 9, 1, 0], [5, 6, 7, 8, 9, 2]], np.int32)


def test_a_causal_text_ends_at_its_first_end(embed_text):
    causal, both_ways = embed_text(TEXTS), embed_text(TEXTS, text_causal=False)
    np.testing.assert_array_equal(causal[0], causal[1])
    assert np.abs(both_ways[0] - both_ways[1]).max() > 1e-3
    # And what comes before the end counts.
    other = TEXTS[:1] + np.eye(6, dtype=np.int32)[:1]
    assert np.abs(embed_text(other) - causal[:1]).max() > 1e-3


def test_a_text_without_an_end_ends_last(embed_text):
    by_end, by_place = embed_text(TEXTS), embed_text(TEXTS, text_pool="last")
    np.testing.assert_allclose(by_end[2], by_place[2], rtol=1e-6)
    assert np.abs(by_end[0] - by_place[0]).max() > 1e-3
    np.testing.assert_array_equal(embed_text(TEXTS, eos_id=2)[2], by_end[2])


@pytest.mark.parametrize("fields", [{"text_pool": "last"}, {"text_pool": "eos"}], ids=str)
def test_padding_is_read_as_another_token(fields, embed_text):
    for pad_id in (1, 4):
        padded = embed_text([[5, 6, 7, 0, 0, 0]], text_pad_id=pad_id, text_causal=False, **fields)
        written = embed_text([[5, 6, 7, *3 * [pad_id]]], text_causal=False, **fields)
        np.testing.assert_array_equal(padded, written)


def test_features_before_the_projection(params, rows):
    """A projection that is the identity leaves the direction of the feature."""
    config = dataclasses.replace(SIGLIP, embedding_dim=32)
    head = params[SIGLIP]["image_head"]
    identity = {"kernel": jnp.eye(32), "bias": jnp.zeros(32)}
    tree = params[SIGLIP] | {"image_head": head | {"projection": identity}}
    tree["text_encoder"] = TwoTowers(config).init(jax.random.key(0))["text_encoder"]
    model = TwoTowers(config)
    memory = model.encode(tree, jnp.asarray(rows["image"]))
    assert memory.shape[1] == config.memory_length == 6
    feature = model.pooled(tree, memory)
    want = feature / jnp.linalg.norm(feature, axis=-1, keepdims=True)
    np.testing.assert_allclose(model.embed_image(tree, memory), want, rtol=1e-5, atol=1e-6)


def test_initial_parameters():
    config = dataclasses.replace(SIGLIP, text_width=256, vocab_size=400, width=256, depth=1)
    model = TwoTowers(config)
    params = model.init(jax.random.key(0))
    table = params["text_encoder"]["token_embedding"]["embedding"]
    assert table.shape == (512, 256) and not np.any(table[400:])
    assert np.std(table[:400]) == pytest.approx(1 / 16, rel=0.02)
    positions = params["text_encoder"]["position_embedding"]
    assert positions.shape == (6, 256) and np.std(positions) == pytest.approx(1 / 16, rel=0.1)
    # Flax's Glorot of shape (1, 1, D) takes 1 for the fan in.
    assert np.abs(params["image_head"]["pool"]["probe"]).max() <= math.sqrt(6 / 257)
    assert np.std(params["image_head"]["pool"]["probe"]) == pytest.approx(
        math.sqrt(2 / 257), rel=0.1
    )
    assert params["contrastive"] == {"logit_scale": np.float32(math.log(10)), "logit_bias": -10}
    scale, bias = model.logit_scale_and_bias(params)
    assert scale == pytest.approx(10) and bias == -10


def test_without_a_bias_the_bias_is_zero():
    model = TwoTowers(CLIP)
    assert set(model.abstract_params()["contrastive"]) == {"logit_scale"}
    scale, bias = model.logit_scale_and_bias(model.init(jax.random.key(0)))
    assert scale == pytest.approx(10) and bias == 0
    projections = (model.abstract_params()[x]["projection"] for x in ("image_head", "text_encoder"))
    assert all(set(projection) == {"kernel"} for projection in projections)


def test_an_image_encoder_alone_needs_no_head():
    config = dataclasses.replace(SIGLIP, pool="gap", image_projection=False, embedding_dim=0)
    assert config.embedding_dim == config.width == 32
    assert "image_head" not in TwoTowers(config).abstract_params()


def test_flops_are_what_the_compiler_counts():
    """Forward, unrolled: a third of the count, but for element-wise work."""
    sizes = variant("B") | {"depth": 1}
    model = TwoTowers(
        TwoTowersConfig(
            image_size=224, patch_size=32, vocab_size=100, pool="map", num_registers=4,
            image_projection=True, text_width=256, text_num_heads=4, scan=False, **sizes,
        )
    )  # fmt: skip

    def forward(params, images, tokens):
        image_BD = model.embed_image(params, model.encode(params, images))
        return image_BD, model.embed_text(params, tokens)

    images = jax.ShapeDtypeStruct((4, 224, 224, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    compiled = jax.jit(forward).lower(model.abstract_params(), images, tokens).compile()
    costs = compiled.cost_analysis()
    assert costs is not None
    assert 3 / 4 * costs["flops"] == pytest.approx(model.flops_per_example(), rel=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_pool": "first"}, "text_pool='first': choose one of"),
        ({"text_num_heads": 3}, "text_width=16 is not a multiple of text_num_heads=3"),
        ({"image_projection": False}, "embedding_dim=24 is not width=32: set image_projection"),
        ({"vocab_size": 0}, "vocab_size=0: expected 1 or more"),
        ({"eos_id": 21}, "eos_id=21: expected a token, 0 to 20"),
        ({"text_pad_id": -1}, "text_pad_id=-1: expected a token"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SIGLIP, **fields)


def test_bad_inputs_are_refused(params):
    model = TwoTowers(SIGLIP)
    with pytest.raises(UserError, match="7 tokens, but text_length=6"):
        model.embed_text(params[SIGLIP], jnp.zeros((2, 7), jnp.int32))


def test_embeddings_are_whole_on_every_tensor_shard(params, rows):
    mesh = make_mesh(MeshShape(data=4, tensor=2))
    model = TwoTowers(SIGLIP)
    with jax.set_mesh(mesh):
        placed = place_tree(mesh, params[SIGLIP], model.param_specs())
        tokens = place_batch(mesh, {"tokens": rows["tokens"]})["tokens"]
        assert jax.typeof(model.embed_text(placed, tokens)).sharding.spec == act_BD
