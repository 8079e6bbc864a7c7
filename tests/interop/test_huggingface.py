"""Hugging Face directories: the library's own models compute what ours do, in and out."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.interop import huggingface, huggingface_compare
from capjax.interop.compare import activation_lines, activations
from capjax.interop.huggingface_config import read_config
from capjax.interop.mapping import Weights, flatten

IMAGE = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 18,
    "patch_size": 6,
}
TEXT = {
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "vocab_size": 57,
    "max_position_embeddings": 9,
}
SQUARE = {"num_patches": 16, "patch_size": 3, "hidden_size": 24, "num_attention_heads": 2}
# The library's class, and what its configuration says beyond the defaults.
MODELS = {
    "clip": ("CLIP", {"vision_config": IMAGE, "text_config": TEXT | {"eos_token_id": 11}}),
    "clip of old": ("CLIP", {"vision_config": IMAGE, "text_config": TEXT | {"eos_token_id": 2}}),
    "clip with gelu": (
        "CLIP",
        {
            "vision_config": IMAGE | {"hidden_act": "gelu", "num_attention_heads": 2},
            "text_config": TEXT | {"hidden_act": "gelu", "eos_token_id": 50},
            "projection_dim": 12,
        },
    ),
    "siglip": ("Siglip", {"vision_config": IMAGE, "text_config": TEXT | {"projection_size": 36}}),
    "siglip with a rest": (
        "Siglip",
        {
            "vision_config": IMAGE | {"image_size": 23},
            "text_config": TEXT | {"projection_size": 36},
        },
    ),
    "siglip2": (
        "Siglip2",
        {
            "vision_config": {"intermediate_size": 30, "num_hidden_layers": 1} | SQUARE,
            "text_config": TEXT | {"projection_size": 24},
        },
    ),
    "vit": ("ViT", IMAGE),
    "vit classifier": ("ViT", IMAGE | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}),
}


@pytest.fixture(params=MODELS)
def directory(request, libraries, tmp_path) -> Path:
    """What the library saves of a small model whose every parameter is random."""
    name, fields = MODELS[request.param]
    config = getattr(libraries.transformers, f"{name}Config")(**fields)
    suffix = "ForImageClassification" if "classifier" in request.param else "Model"
    model = getattr(libraries.transformers, f"{name}{suffix}")(config)
    for parameter in model.parameters():
        parameter.data.normal_(0.1, 0.3)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def read(directory: Path) -> Weights:
    is_siglip2 = "Siglip2" in (directory / "config.json").read_text()
    return huggingface.read(directory, image_size=12 if is_siglip2 else None)


def test_every_activation_is_the_librarys_and_every_parameter_counts(directory, libraries):
    weights = read(directory)
    lines = huggingface.compare(directory, weights)
    names = ["image encoder", "feature"]
    if weights.model == "two_towers":
        names += ["image embedding", "text embedding", "logits"]
    assert [line.split(" [")[0] for line in lines] == names
    inputs = huggingface_compare.parity_inputs(weights)
    wanted = huggingface_compare.library_activations(directory, *inputs)
    leaves, treedef = jax.tree.flatten(weights.params)
    for number, name in enumerate(flatten(weights.params)):
        changed = [x + 0.1 * (i == number) for i, x in enumerate(leaves)]
        # A constant added to all of a projection's input is taken out by a LayerNorm's mean.
        changed[number] = changed[number] * (1 + np.indices(changed[number].shape).sum(0) % 3 / 9)
        other = weights._replace(params=jax.tree.unflatten(treedef, changed))
        with pytest.raises(UserError, match="differs by"):
            pytest.fail(f"{name}: {activation_lines(activations(other, *inputs), wanted, '')}")


def test_the_library_loads_what_is_written(directory, libraries, tmp_path):
    weights = read(directory)
    out = tmp_path / "ours"
    huggingface.write(out, weights)
    assert len(huggingface.compare(out, weights)) == (5 if weights.model == "two_towers" else 2)
    again = huggingface.read(out)
    assert again.config == weights.config
    assert again.preprocessing == weights.preprocessing
    jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)
    options = {"add_pooling_layer": False} if weights.model == "image_encoder" else {}
    model, info = libraries.transformers.AutoModel.from_pretrained(
        out, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    theirs = libraries.transformers.AutoModel.from_pretrained(directory, **options)
    if "siglip2" not in model.config.model_type and "Siglip2" not in type(theirs).__name__:
        assert type(model) is type(theirs)
        old, new = theirs.state_dict(), model.state_dict()
        assert old.keys() == new.keys()
        changed = {name for name in old if not libraries.torch.equal(old[name], new[name])}
        # Only where a class token gave up its position.
        assert all(("class" in name or "cls" in name or "position" in name) for name in changed)


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit"])
def test_what_a_file_leaves_out_is_the_classs_default(kind, libraries, tmp_path):
    sparse, full = tmp_path / "sparse", tmp_path / "full"
    sparse.mkdir()
    (sparse / "config.json").write_text(json.dumps({"model_type": kind}))
    name = {"clip": "CLIP", "siglip": "Siglip", "vit": "ViT"}[kind]
    config = getattr(libraries.transformers, f"{name}Config")()
    config.save_pretrained(full)
    assert read_config(sparse) == read_config(full)
    eps = getattr(config, "vision_config", config).layer_norm_eps
    assert read_config(sparse)[1]["norm_eps"] == eps
