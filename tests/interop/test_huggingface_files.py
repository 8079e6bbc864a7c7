"""Hugging Face directories: what is in their files, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from capjax.data.tokenizer import Tokenizer
from capjax.errors import UserError
from capjax.interop import huggingface
from capjax.interop.huggingface_config import read_config
from capjax.interop.mapping import Weights, flatten
from capjax.models.captioner import CaptionerConfig
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.image_tower import ImageTower
from capjax.models.two_towers import TwoTowers, TwoTowersConfig


def test_a_rest_that_no_patch_reads_is_in_the_preprocessing(safetensors, tmp_path):
    weights = two_towers()._replace(preprocessing={"resize_to": 11})
    huggingface.write(tmp_path, weights)
    assert read_config(tmp_path)[1]["image_size"] == 11
    again = huggingface.read(tmp_path)
    assert again.config.image_size == 8
    assert again.preprocessing["image_size"] == 8
    assert again.preprocessing["resize_to"] == 11
    with pytest.raises(UserError, match="and less than a patch more"):
        huggingface.write(tmp_path, weights._replace(preprocessing={"resize_to": 12}))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "config.json",
            {"model_type": "siglip", "vision_config": {"image_size": 8, "hidden_size": "x"}},
        ),
        ("config.json", {"model_type": "siglip", "text_config": [1]}),
        ("preprocessor_config.json", {"size": {"longest_edge": 8}}),
    ],
)
def test_what_transformers_would_not_write_is_one_line(name, content, safetensors, tmp_path):
    huggingface.write(tmp_path, two_towers())
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match="holds what transformers does not write"):
        huggingface.read(tmp_path)


def two_towers(**fields) -> Weights:
    config = TwoTowersConfig(
        **{
            "image_size": 8,
            "patch_size": 4,
            "width": 12,
            "depth": 2,
            "num_heads": 2,
            "mlp_dim": 16,
            "pool": "map",
            "vocab_size": 30,
            "text_length": 5,
            **fields,
        }
    )
    return Weights("two_towers", config, random_params(TwoTowers(config)))


def clip(**fields) -> Weights:
    return two_towers(
        **{
            "pool": "tok",
            "pre_norm": True,
            "text_causal": True,
            "text_pool": "eos",
            "eos_id": 29,
            "text_pad_id": 0,
            "image_projection": True,
            "text_projection_bias": False,
            "logit_bias_init": None,
            **fields,
        }
    )


def random_params(model):
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.1 + 0.3 * rng.standard_normal(x.shape)).astype(np.float32),
        model.abstract_params(),
    )
    if "text_encoder" in params:  # padding is zero
        params["text_encoder"]["token_embedding"]["embedding"][model.config.vocab_size :] = 0
    return params


def test_clip_takes_over_the_bias_that_it_has_no_name_for(libraries, tmp_path):
    weights = clip()
    assert np.any(weights.params["encoder"]["patch_embedding"]["bias"])
    huggingface.write(tmp_path, weights)
    assert len(huggingface.compare(tmp_path, weights)) == 5


@pytest.mark.parametrize("make", [two_towers, clip])
def test_round_trip(make, safetensors, tmp_path):
    weights = make(activation="quick_gelu", norm_eps=3e-5, image_mean=(0.1, 0.2, 0.3))
    weights = weights._replace(preprocessing={"mode": "crop", "resample": "bilinear"})
    weights.params["encoder"]["patch_embedding"]["bias"][:] = 0
    huggingface.write(tmp_path, weights)
    again = huggingface.read(tmp_path, dtype="bfloat16", remat=None)
    initial = {"logit_scale_init": np.log(10), "logit_bias_init": weights.config.logit_bias_init}
    assert again.config == dataclasses.replace(weights.config, dtype="bfloat16", **initial)
    assert again.preprocessing == {
        "mode": "crop",
        "resample": "bilinear",
        "antialias": True,
        "exact": True,
        "image_size": 8,
    }
    assert again.notes == ()
    jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)


def test_the_tokenizer_goes_along(safetensors, tmp_path):
    model = Tokenizer.train(["a cat", "a hat"] * 9, 290).model_bytes
    huggingface.write(tmp_path, two_towers()._replace(tokenizer_model=model))
    assert huggingface.read(tmp_path).tokenizer_model == model
    (tmp_path / "spiece.model").write_bytes(b"nothing")
    weights = huggingface.read(tmp_path)
    assert weights.tokenizer_model == b""
    assert "without its tokenizer" in weights.notes[-1]


@pytest.mark.parametrize(
    ("text", "tokenizer", "pad"),
    [
        ({}, None, 1),
        ({"pad_token_id": 3}, None, 3),
        ({"vocab_size": 256_000}, None, 0),
        ({"vocab_size": 256_000}, {"pad_token": "</s>", "eos_token": {"content": "</s>"}}, 1),
        ({}, {"pad_token": "<pad>", "eos_token": "<eos>"}, 0),
    ],
    ids=str,
)
def test_what_siglip_reads_for_padding(text, tokenizer, pad, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "text_config": text}))
    if tokenizer is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert read_config(tmp_path)[1]["text_pad_id"] == pad


def test_every_difference_is_named(safetensors, tmp_path):
    huggingface.write(tmp_path, two_towers())
    file = tmp_path / "model.safetensors"
    arrays = safetensors.load_file(file)
    del arrays["vision_model.head.attention.in_proj_bias"]
    arrays["text_model.encoder.layers.2.mlp.fc1.bias"] = np.zeros(16, np.float32)
    arrays["logit_scale"] = np.zeros((), np.float32)
    arrays["vision_model.embeddings.position_ids"] = np.arange(4)
    safetensors.save_file(arrays, file)
    with pytest.raises(UserError) as error:
        huggingface.read(tmp_path)
    assert str(error.value) == (
        "not the weights of a SiglipModel as config.json says: "
        "missing: vision_model.head.attention.in_proj[key].bias, "
        "vision_model.head.attention.in_proj[query].bias, "
        "vision_model.head.attention.in_proj[value].bias; "
        "not used: text_model.encoder.layers.2.mlp.fc1.bias; "
        "shapes: logit_scale () instead of (1,)"
    )


def test_weights_in_parts_and_in_bfloat16(libraries, tmp_path):
    from safetensors import torch as files

    weights = clip()
    huggingface.write(tmp_path / "whole", weights)
    arrays = files.load_file(tmp_path / "whole" / "model.safetensors")
    arrays = {name: x.to(libraries.torch.bfloat16) for name, x in arrays.items()}
    names = sorted(arrays)
    index = {name: f"model-{names.index(name) % 2}.safetensors" for name in names}
    for kind in ("parts", "pickled"):
        (tmp_path / kind).mkdir()
        config = (tmp_path / "whole" / "config.json").read_text()
        (tmp_path / kind / "config.json").write_text(config)
    for part in set(index.values()):
        some = {name: x for name, x in arrays.items() if index[name] == part}
        files.save_file(some, tmp_path / "parts" / part)
    (tmp_path / "parts" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    libraries.torch.save(arrays, tmp_path / "pickled" / "pytorch_model.bin")
    found = [huggingface.read(tmp_path / kind) for kind in ("whole", "parts", "pickled")]
    assert "no preprocessor_config.json" in found[1].notes[0]
    jax.tree.map(np.testing.assert_array_equal, found[1].params, found[2].params)
    for one, other in zip(*(flatten(x.params).values() for x in found[:2]), strict=True):
        np.testing.assert_allclose(one, other, rtol=2**-7, atol=2**-7)


def test_models_that_the_library_lacks_are_not_written(tmp_path):
    with pytest.raises(UserError, match=r"nearest, SiglipModel, needs pool='map' \(is 'gap'\)$"):
        huggingface.write(tmp_path, two_towers(pool="gap"))
    with pytest.raises(UserError, match=r"CLIPModel, needs text_causal=True \(is False\), eos_id"):
        huggingface.write(tmp_path, clip(text_causal=False, eos_id=2))
    with pytest.raises(UserError, match="SiglipModel, needs a logit bias"):
        huggingface.write(tmp_path, two_towers(logit_bias_init=None))
    sizes = {"image_size": 8, "patch_size": 4, "width": 12, "depth": 1, "num_heads": 2}
    config = CaptionerConfig(**sizes, mlp_dim=16, vocab_size=30)
    with pytest.raises(UserError, match="no class for a captioner"):
        huggingface.write(tmp_path, Weights("captioner", config, {}))
    config = ImageEncoderConfig(**sizes, mlp_dim=16, pool="tok", num_registers=2)
    weights = Weights("image_encoder", config, random_params(ImageTower(config)))
    with pytest.raises(UserError, match=r"ViTModel, needs num_registers=0 \(is 2\)"):
        huggingface.write(tmp_path, weights)
    with pytest.raises(UserError, match=r"SiglipImageProcessor has no such preprocessing.*pad"):
        huggingface.write(tmp_path, two_towers()._replace(preprocessing={"mode": "pad"}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, r"model_type='bert': choose one of \('clip', 'siglip', 'siglip2'"),
        (
            {"model_type": "siglip2"},
            r"any shape \(NaFlex\), which is not supported; give image_size=256",
        ),
        (
            {"model_type": "siglip2", "vision_config": {"num_patches": 250}},
            "num_patches=250: expected a square",
        ),
        (
            {"model_type": "clip", "text_config": {"hidden_act": "gelu"}},
            "hidden_act is 'quick_gelu' for images and 'gelu' for text",
        ),
        ({"model_type": "vit", "image_size": [8, 16]}, r"image_size=\[8, 16\]: expected a square"),
        ({"model_type": "vit", "num_channels": 1}, "num_channels=1: expected 3"),
        ({"model_type": "vit", "hidden_act": "relu"}, "hidden_act='relu': choose one of"),
        ([], "expected a JSON object"),
        ({"model_type": "vit"}, "no weights there; expected model.safetensors"),
    ],
    ids=str,
)
def test_other_directories_are_refused(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        huggingface.read(tmp_path)


def test_no_directory_and_no_model(safetensors, tmp_path):
    with pytest.raises(UserError, match=r"expected a directory with config\.json"):
        huggingface.read(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        huggingface.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        huggingface.read(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        huggingface.read(tmp_path)


def test_without_the_libraries_nothing_is_compared(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert huggingface.compare(tmp_path, two_towers()) == [
        "not compared with transformers: torch and transformers missing "
        "(pip install 'capjax[parity]')"
    ]
