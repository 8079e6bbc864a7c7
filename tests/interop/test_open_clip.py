"""open_clip's layout: the weights of a CLIPModel of transformers under its names, in and out."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.interop import huggingface_compare, open_clip
from capjax.interop.compare import activation_lines, activations
from capjax.interop.mapping import Weights
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.two_towers import TwoTowers, TwoTowersConfig

SIZES = {
    "vision_config": {
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 18,
        "patch_size": 6,
    },
    "text_config": {
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "vocab_size": 57,
        "max_position_embeddings": 9,
        "eos_token_id": 56,
    },
    "projection_dim": 24,
}
HEADS = {"num_heads": 3, "text_num_heads": 5}
# Which name of transformers holds what, of a tower and of a block.
TOWER = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def renamed(state: dict, torch) -> dict:
    """A CLIPModel's state under open_clip's names: what the conversion scripts of both do."""
    out = {name: state[theirs] for name, theirs in TOWER.items()}
    out["visual.proj"] = state["visual_projection.weight"].T
    out["text_projection"] = state["text_projection.weight"].T
    for ours, theirs, depth in (("visual.", "vision_model", 3), ("", "text_model", 2)):
        for i in range(depth):
            to = f"{ours}transformer.resblocks.{i}"
            at = f"{theirs}.encoder.layers.{i}"
            for leaf in ("weight", "bias"):
                for name, other in BLOCK.items():
                    out[f"{to}.{name}.{leaf}"] = state[f"{at}.{other}.{leaf}"]
                parts = [state[f"{at}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
                out[f"{to}.attn.in_proj_{leaf}"] = torch.cat(parts)
    return {name: x.contiguous() for name, x in out.items()}


@pytest.fixture
def theirs(libraries, tmp_path):
    """A random CLIPModel's directory, and its state under open_clip's names."""
    transformers = libraries.transformers
    model = transformers.CLIPModel(transformers.CLIPConfig(**SIZES))
    for parameter in model.parameters():
        parameter.data.normal_(0.1, 0.3)
    model.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip", renamed(model.state_dict(), libraries.torch)


@pytest.mark.parametrize("form", ["safetensors", "training checkpoint", "apart"])
def test_every_activation_is_that_of_the_same_weights_elsewhere(form, theirs, libraries, tmp_path):
    from safetensors.torch import save_file

    directory, state = theirs
    if form == "training checkpoint":
        path = tmp_path / "epoch_1.pt"
        state = {f"module.{name}": x for name, x in state.items()}
        libraries.torch.save({"epoch": 1, "name": "a run", "state_dict": state}, path)
    else:
        path = tmp_path / "weights.safetensors"
        if form == "apart":  # as CustomTextCLIP has them
            kept = ("visual.", "logit_")
            state = {k if k.startswith(kept) else f"text.{k}": v for k, v in state.items()}
        save_file(state, path)
    weights = open_clip.read(path, activation="quick_gelu", **HEADS)
    assert weights.notes == ()
    inputs = huggingface_compare.parity_inputs(weights)
    wanted = huggingface_compare.library_activations(directory, *inputs)
    assert len(activation_lines(activations(weights, *inputs), wanted, "transformers")) == 5
    other = open_clip.read(path, **HEADS)
    assert other.config.activation == "gelu"
    assert other.notes == (
        "activation='gelu' is assumed; give 'quick_gelu' for weights of OpenAI's",
    )


def test_what_is_written_is_what_was_read_but_for_the_class_tokens_place(
    theirs, safetensors, tmp_path
):
    state = {name: x.numpy() for name, x in theirs[1].items()}
    safetensors.save_file(state, tmp_path / "weights.safetensors")
    weights = open_clip.read(tmp_path / "weights.safetensors", activation="quick_gelu", **HEADS)
    open_clip.write(tmp_path / "out", weights)
    written = safetensors.load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert written.keys() == state.keys()
    places = state["visual.positional_embedding"]
    state["visual.class_embedding"] = state["visual.class_embedding"] + places[0]
    state["visual.positional_embedding"] = np.concatenate([np.zeros_like(places[:1]), places[1:]])
    for name, x in state.items():
        np.testing.assert_array_equal(written[name], x, err_msg=name)
    again = open_clip.read(tmp_path / "out")
    assert again.config == weights.config
    assert again.notes == ()
    jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)


def clip(**fields) -> Weights:
    config = TwoTowersConfig(
        **{
            "image_size": 8,
            "patch_size": 4,
            "width": 12,
            "depth": 2,
            "num_heads": 2,
            "mlp_dim": 17,
            "pool": "tok",
            "pre_norm": True,
            "vocab_size": 30,
            "text_length": 5,
            "text_width": 20,
            "text_num_heads": 4,
            "text_causal": True,
            "text_pool": "eos",
            "eos_id": 29,
            "text_pad_id": 0,
            "image_projection": True,
            "text_projection_bias": False,
            "activation": "gelu",
            "norm_eps": 1e-5,
            **fields,
        }
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.1 + 0.3 * rng.standard_normal(x.shape)).astype(np.float32),
        TwoTowers(config).abstract_params(),
    )
    params["encoder"]["patch_embedding"]["bias"][:] = 0
    params["text_encoder"]["token_embedding"]["embedding"][30:] = 0
    return Weights("two_towers", config, params)


def test_settings_travel_with_the_weights(safetensors, tmp_path):
    weights = clip(eos_id=7, image_mean=(0.5, 0.25, 0.125))
    weights = weights._replace(preprocessing={"mode": "stretch", "resample": "bilinear"})
    open_clip.write(tmp_path, weights)
    settings = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert int(12 * settings["model_cfg"]["vision_cfg"]["mlp_ratio"]) == 17
    assert settings["model_cfg"]["init_logit_bias"] == -10
    assert settings["preprocess_cfg"]["resize_mode"] == "squash"
    again = open_clip.read(tmp_path, remat="full")
    assert (again.config.eos_id, again.config.remat) == (7, "full")
    assert again.config.image_mean == (0.5, 0.25, 0.125)
    wanted = {"mode": "stretch", "resample": "bilinear", "antialias": True, "exact": True}
    wanted["image_size"] = 8
    assert again.preprocessing == wanted
    jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)
    with pytest.raises(UserError, match="no such preprocessing"):
        open_clip.write(tmp_path, weights._replace(preprocessing={"resize_to": 9}))


def test_the_bias_of_patches_is_written_into_their_positions(safetensors, tmp_path):
    weights = clip()
    weights.params["encoder"]["patch_embedding"]["bias"][:] = np.arange(12)
    open_clip.write(tmp_path, weights)
    again = open_clip.read(tmp_path)
    assert not again.params["encoder"]["patch_embedding"]["bias"].any()
    inputs = huggingface_compare.parity_inputs(weights)
    wanted = activations(weights, *inputs)
    assert len(activation_lines(activations(again, *inputs), wanted, "before")) == 5


def test_a_files_own_preprocessing_and_heads_are_openais(safetensors, tmp_path):
    open_clip.write(tmp_path, clip(width=64, embedding_dim=8, text_width=128, text_num_heads=2))
    weights = open_clip.read(tmp_path / "open_clip_model.safetensors")
    assert (weights.config.num_heads, weights.config.text_num_heads) == (1, 2)
    assert weights.config.image_std == (0.26862954, 0.26130258, 0.27577711)
    assert weights.preprocessing["mode"] == "crop"
    assert weights.preprocessing["resample"] == "bicubic"


def change(path: Path, section: str, name: str, value) -> None:
    settings = json.loads(path.read_text())
    found = settings
    for part in section.split("."):
        found = found[part]
    found[name] = value
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("model_cfg.vision_cfg", "pool_type", "avg", r"vision_cfg.pool_type='avg': choose one of"),
        ("model_cfg.text_cfg", "no_causal_mask", True, "text_cfg.no_causal_mask=True"),
        (
            "preprocess_cfg",
            "resize_mode",
            "longest",
            r"resize_mode='longest'.*'shortest', 'squash'",
        ),
        ("preprocess_cfg", "size", [8, 16], r"size=\[8, 16\]"),
    ],
)
def test_settings_that_we_do_not_have_are_refused(
    section, name, value, message, safetensors, tmp_path
):
    open_clip.write(tmp_path, clip())
    change(tmp_path / "open_clip_config.json", section, name, value)
    with pytest.raises(UserError, match=message):
        open_clip.read(tmp_path)


def test_every_difference_is_named(safetensors, tmp_path):
    open_clip.write(tmp_path, clip())
    arrays = safetensors.load_file(tmp_path / "open_clip_model.safetensors")
    del arrays["visual.ln_pre.bias"]
    arrays["visual.transformer.resblocks.1.ls_1.gamma"] = np.zeros(12, np.float32)
    arrays["text_projection"] = np.zeros((20, 7), np.float32)
    safetensors.save_file(arrays, tmp_path / "other.safetensors")
    with pytest.raises(UserError) as error:
        open_clip.read(tmp_path / "other.safetensors", num_heads=2, text_num_heads=4)
    assert str(error.value) == (
        "not the weights of an open_clip CLIP with a ViT and a text transformer: "
        "missing: visual.ln_pre.bias; not used: visual.transformer.resblocks.1.ls_1.gamma; "
        "shapes: text_projection (20, 7) instead of (20, 20)"
    )
    safetensors.save_file({"visual.trunk.w": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"missing: visual\.conv1\.weight, visual\.positional"):
        open_clip.read(tmp_path / "other.safetensors")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_clip.read(tmp_path / "nothing.safetensors")
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"ends in one of \.safetensors, \.bin, \.pt, \.pth"):
        open_clip.read(tmp_path / "weights.npz")
    with pytest.raises(UserError, match=r"expected open_clip_model\.safetensors"):
        open_clip.read(tmp_path)


def test_pickles_that_are_no_state_are_refused(libraries, tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="not a plain file of tensors"):
        open_clip.read(tmp_path / "broken.pt")
    libraries.torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(UserError, match="no tensors by name"):
        open_clip.read(tmp_path / "empty.pt")


def test_models_that_open_clip_lacks_are_not_written(tmp_path):
    with pytest.raises(UserError, match=r"it needs norm_eps=1e-05 \(is 1e-06\), activation='gelu'"):
        open_clip.write(tmp_path, clip(norm_eps=1e-6, activation="gelu_tanh"))
    config = ImageEncoderConfig(
        image_size=8, patch_size=4, width=12, depth=1, num_heads=2, mlp_dim=16
    )
    with pytest.raises(UserError, match="no class for a image_encoder of ours"):
        open_clip.write(tmp_path, Weights("image_encoder", config, {}))
    with pytest.raises(UserError, match="no such preprocessing"):
        open_clip.write(tmp_path, clip()._replace(preprocessing={"mode": "pad"}))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not importlib.util.find_spec("open_clip"), reason="needs open_clip_torch")
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_open_clip_itself_computes_the_same(activation, libraries, tmp_path):
    weights = clip(activation=activation, eos_id=29 if activation == "gelu" else 7)
    open_clip.write(tmp_path, weights)
    assert len(open_clip.compare(tmp_path, weights)) == 3


def test_without_the_library_nothing_is_compared(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert open_clip.compare(tmp_path, clip()) == [
        "not compared with open_clip: torch and open_clip missing (pip install open_clip_torch)"
    ]
