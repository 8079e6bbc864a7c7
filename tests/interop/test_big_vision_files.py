"""big_vision's files: both layouts, wrappers, old names, and what is refused."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capjax.errors import UserError
from capjax.interop.big_vision import compare, read, to_arrays, write
from capjax.interop.mapping import Weights
from capjax.interop.npz import stacked, unstacked
from capjax.models import Captioner, CaptionerConfig, TwoTowers, TwoTowersConfig
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.image_tower import ImageTower

IMAGE = {"image_size": 12, "patch_size": 4, "width": 16, "depth": 3, "num_heads": 4, "mlp_dim": 24}
CAPTIONER = CaptionerConfig(
    **IMAGE,
    decoder_width=8,
    decoder_depth=2,
    decoder_num_heads=2,
    decoder_mlp_dim=20,
    decoder_bias=True,
    vocab_size=130,
    text_length=5,
)
TWO_TOWERS = TwoTowersConfig(
    **IMAGE,
    pool="map",
    text_width=12,
    text_depth=2,
    text_num_heads=3,
    text_mlp_dim=20,
    vocab_size=130,
    text_length=5,
)
VIT = ImageEncoderConfig(**IMAGE, pool="tok")
MODELS = {CaptionerConfig: Captioner, TwoTowersConfig: TwoTowers, ImageEncoderConfig: ImageTower}
NAMES = {
    CaptionerConfig: "captioner",
    TwoTowersConfig: "two_towers",
    ImageEncoderConfig: "image_encoder",
}


def random_weights(config: ImageEncoderConfig, scale: float = 0.3) -> Weights:
    """Normal draws everywhere, zero in the padding (which no file holds)."""
    rng = np.random.default_rng(0)
    abstract = MODELS[type(config)](config).abstract_params()
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract)
    for view in to_arrays(config, params).values():
        view[...] = scale * rng.standard_normal(view.shape)
    return Weights(NAMES[type(config)], config, params)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def heads_and_width():
    return st.tuples(st.integers(1, 3), st.sampled_from([4, 8])).map(lambda x: (x[0], x[0] * x[1]))


@st.composite
def configs(draw):
    """Kind and fields of models that big_vision has: any widths, depths, pooling and positions.

    (Made into configurations by the test: beartype draws from `random`, which hypothesis forbids.)
    """
    heads, width = draw(heads_and_width())
    patch = draw(st.integers(1, 4))
    image = {
        "image_size": patch * draw(st.integers(1, 3)),
        "patch_size": patch,
        "width": width * 2,
        "depth": draw(st.integers(1, 3)),
        "num_heads": heads,
        "mlp_dim": draw(st.integers(1, 9)),
        "posemb": draw(st.sampled_from(["learn", "sincos2d"])),
    }
    heads, width = draw(heads_and_width())
    text = {"width": 2 * width, "depth": draw(st.integers(1, 3)), "num_heads": heads, "mlp_dim": 7}
    tokens = {"vocab_size": draw(st.integers(3, 140)), "text_length": draw(st.integers(1, 6))}
    model = draw(st.sampled_from(list(NAMES.values())))
    if model == "captioner":
        text = {f"decoder_{name}": value for name, value in text.items()}
        flags = {name: draw(st.booleans()) for name in ("decoder_bias", "mask_token")}
        return CaptionerConfig, {**image, **text, **tokens, **flags}
    image["pool"] = draw(st.sampled_from(["gap", "tok", "map"]))
    if model == "image_encoder":
        return ImageEncoderConfig, image
    text = {f"text_{name}": value for name, value in text.items()}
    projection = draw(st.booleans())
    return TwoTowersConfig, {
        **image,
        **text,
        **tokens,
        "image_projection": projection,
        "embedding_dim": draw(st.integers(1, 9)) if projection else 0,
        "logit_bias_init": draw(st.sampled_from([-10.0, None])),
    }


@settings(max_examples=40)
@given(kind_and_fields=configs(), layout=st.sampled_from(["loop", "scan"]))
def test_round_trip(kind_and_fields, layout):
    kind, fields = kind_and_fields
    config = kind(**fields)
    weights = random_weights(config)
    arrays = to_arrays(config, weights.params, layout)
    assert any("encoderblock_0/" in name for name in arrays) == (layout == "loop")
    fixed = {"image_size": config.image_size, "text_length": getattr(config, "text_length", None)}
    found = read(arrays, **fixed if config.posemb == "sincos2d" else {})
    assert (found.model, found.config, found.notes) == (weights.model, config, ())
    assert_trees_equal(found.params, weights.params)


def test_a_file_and_what_its_numbers_give(tmp_path):
    for layout in ("loop", "scan"):
        weights = random_weights(TWO_TOWERS)
        path = tmp_path / f"{layout}.npz"
        write(path, weights, layout=layout)
        found = read(path, dtype="bfloat16")
        assert found.config == dataclasses.replace(TWO_TOWERS, dtype="bfloat16")
        assert found.preprocessing == {"antialias": False, "mode": "stretch"}
        assert_trees_equal(found.params, weights.params)
        lines = compare(path, found)
        assert [line.split(":")[0] for line in lines] == [
            "image encoder [2x9x16]",
            "feature [2x16]",
            "image embedding [2x16]",
            "text embedding [2x16]",
        ]


def test_a_difference_in_the_numbers_is_an_error(tmp_path):
    weights = random_weights(VIT)
    write(tmp_path / "vit.npz", weights)
    weights.params["encoder"]["norm"]["scale"][0] += 0.01
    with pytest.raises(UserError, match=r"image encoder differs by .* another architecture"):
        compare(tmp_path / "vit.npz", weights)


def test_scan_layout_stacks_as_theirs():
    loop = to_arrays(CAPTIONER, random_weights(CAPTIONER).params)
    scan = to_arrays(CAPTIONER, random_weights(CAPTIONER).params, layout="scan")
    query = scan["encoder/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"]
    assert query.shape == (3, 16, 4, 4)
    assert scan["decoder/EncDecBlock/CrossAttn/key/kernel"].shape == (16, 2, 2, 4)
    for i in range(2):
        np.testing.assert_array_equal(
            scan["decoder/EncDecBlock/LayerNorm1/scale"][:, i],
            loop[f"decoder/EncDecBlock{i}/LayerNorm1/scale"],
        )
    assert_trees_equal(unstacked(scan), loop)
    arrays = to_arrays(TWO_TOWERS, random_weights(TWO_TOWERS).params, layout="scan")
    assert arrays["txt/Encoder_0/encoderblock/LayerNorm_0/scale"].shape == (2, 12)
    assert arrays["img/MAPHead_0/probe"].shape == (1, 1, 16)
    assert arrays["t"].shape == arrays["b"].shape == (1,)


def test_many_blocks_keep_their_order():
    arrays = {f"Transformer/encoderblock_{i}/x": np.full(1, i) for i in range(12)}
    assert stacked(arrays)["Transformer/encoderblock/x"].ravel().tolist() == list(range(12))


def test_fixed_positions_need_sizes():
    config = dataclasses.replace(CAPTIONER, posemb="sincos2d")
    arrays = to_arrays(config, random_weights(config).params)
    with pytest.raises(UserError, match="fixed positions: give image_size and text_length"):
        read(arrays)


@pytest.mark.parametrize("prefix", ["params/", "opt/target/"])
def test_wrappings(prefix):
    params = random_weights(CAPTIONER).params
    arrays = to_arrays(CAPTIONER, params)
    wrapped = {prefix + name: x for name, x in arrays.items()} | {"opt/state/step": np.zeros(())}
    assert_trees_equal(read(wrapped).params, params)


def test_bfloat16_as_numpy_saves_it(tmp_path):
    weights = random_weights(CAPTIONER)
    params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), weights.params)
    path = tmp_path / "weights.npz"
    write(path, weights._replace(params=params))
    with np.load(path) as file:
        assert file["decoder/LayerNorm/scale"].dtype == np.dtype("V2")
    assert_trees_equal(read(path).params, jax.tree.map(lambda x: x.astype(np.float32), params))


@pytest.mark.parametrize(
    ("config", "subtree"), [(TWO_TOWERS, "img"), (TWO_TOWERS, "img/"), (CAPTIONER, "encoder")]
)
def test_a_tower_of_a_model(config, subtree, tmp_path):
    weights = random_weights(config)
    path = tmp_path / "model.npz"
    arrays = to_arrays(config, weights.params)
    np.savez(path, **{f"params/{name}": x for name, x in arrays.items()})
    found = read(f"{path}:{subtree}")
    assert found.model == "image_encoder"
    assert found.config == ImageEncoderConfig(**IMAGE, pool=config.pool)
    assert_trees_equal(found.params["encoder"], weights.params["encoder"])
    if config.pool == "map":
        assert_trees_equal(found.params["image_head"], weights.params["image_head"])
    assert len(compare(f"{path}:{subtree}", found)) == 2
    with pytest.raises(UserError, match=r"model.npz has no sub-tree 'image'; it has"):
        read(f"{path}:image")


def test_a_classifier_gives_its_encoder():
    weights = random_weights(VIT)
    arrays = to_arrays(VIT, weights.params)
    arrays |= {"head/kernel": np.ones((16, 7)), "head/bias": np.ones(7)}
    arrays |= {"pre_logits/kernel": np.ones((16, 16)), "pre_logits/bias": np.ones(16)}
    found = read(arrays)
    assert found.config == VIT
    assert_trees_equal(found.params, weights.params)
    assert [note.split()[0] for note in found.notes] == ["head/", "pre_logits/"]


def test_old_positions_and_names():
    """ViTs of before 2022: positions elsewhere and of the class token too, one count of modules."""
    weights = random_weights(VIT)
    new = to_arrays(VIT, weights.params)
    first = np.random.default_rng(1).standard_normal((1, 1, 16)).astype(np.float32)
    old = {
        name.replace("LayerNorm_1", "LayerNorm_2")
        .replace("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1")
        .replace("MlpBlock_0", "MlpBlock_3"): x
        for name, x in new.items()
        if name not in ("pos_embedding", "cls")
    }
    old["cls"] = new["cls"] - first
    positions = np.concatenate([first, new["pos_embedding"]], axis=1)
    for place in ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding"):
        found = read({"opt/target/" + name: x for name, x in (old | {place: positions}).items()})
        assert found.config == VIT
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found.params, weights.params
        )


def test_old_pooling_head_and_text_positions():
    weights = random_weights(TWO_TOWERS)
    arrays = {
        name.replace("MAPHead_0/", ""): x
        for name, x in to_arrays(TWO_TOWERS, weights.params).items()
    }
    assert "img/probe" in arrays
    arrays["txt/Encoder_0/pos_embedding"] = np.full((1, 5, 12), 0.25, np.float32)
    arrays["txt/pos_embedding"] = arrays["txt/pos_embedding"] - 0.25
    found = read(arrays)
    assert found.config == TWO_TOWERS
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found.params, weights.params
    )


def test_every_difference_is_named():
    arrays = to_arrays(CAPTIONER, random_weights(CAPTIONER).params)
    del arrays["decoder/LayerNorm/bias"], arrays["decoder/EncDecBlock0/SelfAttn/out/kernel"]
    arrays["img/head/kernel"] = np.zeros(3, np.float32)
    arrays["encoder/embedding/bias"] = np.zeros(17, np.float32)
    with pytest.raises(UserError) as error:
        read(arrays)
    assert str(error.value) == (
        "not the weights of a big_vision CapPa: "
        "missing: decoder/EncDecBlock0/SelfAttn/out/kernel, decoder/LayerNorm/bias; "
        "not used: img/head/kernel; "
        "shapes: encoder/embedding/bias (17,) instead of (16,)"
    )


def test_differences_of_many_blocks_are_one():
    config = dataclasses.replace(TWO_TOWERS, text_depth=12)
    arrays = to_arrays(config, random_weights(config).params)
    for i in range(12):
        del arrays[f"txt/Encoder_0/encoderblock_{i}/LayerNorm_1/bias"]
        name = f"txt/Encoder_0/encoderblock_{i}/LayerNorm_0/bias"
        arrays[name] = arrays[name][:, None]
    for i in (1, 2):
        arrays[f"img/Transformer/encoderblock_{i}/gate"] = np.zeros(1)
    with pytest.raises(UserError) as error:
        read(arrays)
    assert str(error.value) == (
        "not the weights of big_vision two towers: "
        "missing: txt/Encoder_0/encoderblock_{0..11}/LayerNorm_1/bias; "
        "not used: img/Transformer/encoderblock_{1..2}/gate; "
        "shapes: txt/Encoder_0/encoderblock_{0..11}/LayerNorm_0/bias (12, 1) instead of (12,)"
    )


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither a CapPa nor .* it has w$"):
        read({"w": np.zeros(3)})
    with pytest.raises(UserError, match=r"missing: decoder/EmbedTargets/embedding, .*LogitsDense"):
        read({"decoder/x": np.zeros(3)})
    with pytest.raises(UserError, match=r"nothing\.npz: not a readable"):
        read(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(UserError, match=r"text\.npz: not a readable \.npz file"):
        read(tmp_path / "text.npz")
    write(tmp_path / "torn.npz", random_weights(VIT))
    data = (tmp_path / "torn.npz").read_bytes()
    for kept in (len(data) // 2, len(data) - 7):
        (tmp_path / "torn.npz").write_bytes(data[:kept])
        with pytest.raises(UserError, match=r"torn\.npz: not a readable \.npz file"):
            read(tmp_path / "torn.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(UserError, match=r"one\.npz: one array, expected"):
        read(tmp_path / "one.npz")


@pytest.mark.parametrize(
    ("config", "fields", "words"),
    [
        (VIT, {"num_registers": 2}, "no place for: encoder/registers"),
        (VIT, {"pre_norm": True}, "no place for: encoder/pre_norm/bias, encoder/pre_norm/scale"),
        (VIT, {"activation": "quick_gelu"}, "activation='quick_gelu': big_vision's models have"),
        (TWO_TOWERS, {"text_causal": True}, "text_causal=True: big_vision's"),
    ],
)
def test_what_big_vision_does_not_have_is_not_written(config, fields, words):
    config = dataclasses.replace(config, **fields)
    params = MODELS[type(config)](config).abstract_params()
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
    with pytest.raises(UserError, match=words):
        to_arrays(config, params)
