"""open_clip's CLIP in and out: ViT and causal text encoder, in its names and OpenAI's.

Source: `src/open_clip/model.py`, `transformer.py`, `transform.py` of mlfoundations/open_clip. Its
directories hold `open_clip_model.safetensors` (or `open_clip_pytorch_model.bin`, for which torch is
needed) and `open_clip_config.json`. A file alone says neither activation nor heads: the activation
is GELU unless `activation="quick_gelu"` is given, as OpenAI's weights need; the heads are those of
open_clip's own models of that width. Class token and patch bias are as in `huggingface`.
"""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from capjax.errors import UserError
from capjax.interop.compare import activation_lines, activations
from capjax.interop.huggingface_compare import parity_inputs
from capjax.interop.mapping import (
    FlatArrays,
    Leaf,
    Modules,
    Shapes,
    Table,
    Weights,
    export,
    fill,
    shapes_of,
    used_rows,
)
from capjax.interop.open_clip_config import (
    WHAT,
    fields_of_settings,
    fields_of_shapes,
    model_settings,
    read_preprocessing,
    write_preprocessing,
)
from capjax.interop.tensor_files import read_json, read_tensors, write_tensors
from capjax.interop.torch_names import fold_class_token, torch_table, unfold_class_token
from capjax.models.two_towers import TwoTowers, TwoTowersConfig

_STEMS = ("open_clip_model", "open_clip_pytorch_model")
_BLOCK = (
    ("ln_1", "attention_norm", None),
    ("attn.in_proj", "attention/qkv", None),
    ("attn.out_proj", "attention/out", None),
    ("ln_2", "mlp_norm", None),
    ("mlp.c_fc", "mlp/up", None),
    ("mlp.c_proj", "mlp/down", None),
)
_MODULES = (
    ("visual.conv1", "encoder/patch_embedding", None),
    ("visual.ln_pre", "encoder/pre_norm", None),
    ("visual.ln_post", "encoder/norm", None),
    ("token_embedding", "text_encoder/token_embedding", None),
    ("ln_final", "text_encoder/norm", None),
)
_STACKS: dict[str, tuple[str, Modules]] = {
    "visual.transformer.resblocks.{}": ("encoder/blocks", _BLOCK),
    "transformer.resblocks.{}": ("text_encoder/blocks", _BLOCK),
}
_ARRAYS = {
    "visual.class_embedding": Leaf("encoder/class_token"),
    "visual.positional_embedding": Leaf("encoder/position_embedding"),
    "visual.proj": Leaf("image_head/projection/kernel"),
    "positional_embedding": Leaf("text_encoder/position_embedding"),
    "text_projection": Leaf("text_encoder/projection/kernel"),
    "logit_scale": Leaf("contrastive/logit_scale"),
    "logit_bias": Leaf("contrastive/logit_bias"),
}
_CLASS_TOKEN = ("visual.class_embedding", "visual.positional_embedding")
_PACKAGES = ("torch", "open_clip")
_ASSUMED_GELU = "activation='gelu' is assumed; give 'quick_gelu' for weights of OpenAI's"


def read(path: str | Path, **fields: Any) -> Weights:
    """The model in a file or a directory.

    Args:
      path: a directory, a `.safetensors` file, or a pickled one (`.pt`, `.bin`; it needs torch).
      **fields: of the configuration, before what the files tell: activation, num_heads,
        text_num_heads, image_mean, image_std, dtype, remat, ...

    Raises `UserError` with the whole difference where names or shapes are not theirs.
    """
    path = Path(path)
    fields = {name: value for name, value in fields.items() if value is not None}
    arrays = _read(path)
    settings = read_json(path / "open_clip_config.json") if path.is_dir() else {}
    told = fields_of_shapes(arrays) | fields_of_settings(settings.get("model_cfg", {}))
    notes = () if "activation" in (told | fields) else (_ASSUMED_GELU,)
    told.setdefault("activation", "gelu")
    preprocessing, statistics = read_preprocessing(
        settings.get("preprocess_cfg", {}), told["image_size"]
    )
    config = TwoTowersConfig(**(told | statistics | fields))
    shapes = shapes_of(TwoTowers(config).abstract_params())
    fold_class_token(arrays, *_CLASS_TOKEN)
    arrays.setdefault("visual.conv1.bias", np.zeros(config.width, np.float32))
    params = fill(_table(config, shapes), arrays, shapes, WHAT)
    return Weights("two_towers", config, params, notes, preprocessing)


def write(path: str | Path, weights: Weights) -> None:
    """Writes a directory that open_clip loads as `local-dir:PATH`.

    Raises `UserError` where open_clip has no such model or preprocessing.
    """
    config = _config_of(weights)
    settings = {
        "model_cfg": model_settings(config),
        "preprocess_cfg": write_preprocessing(config, weights.preprocessing),
    }
    arrays = dict(export(_table(config, shapes_of(weights.params)), weights.params))
    token, positions = _CLASS_TOKEN
    arrays[positions] = arrays[positions] + arrays.pop("visual.conv1.bias")
    unfold_class_token(arrays, token, positions)
    arrays[token] = arrays[token].reshape(-1)
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / "open_clip_model.safetensors", arrays)
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (directory / "open_clip_config.json").write_text(text)


def compare(path: str | Path, weights: Weights) -> list[str]:
    """A line for each activation that open_clip's own model and `weights` both compute.

    Raises `UserError` where one differs by more than `compare.TOLERANCE`. Where open_clip is not
    installed, the one line says so.
    """
    missing = [name for name in _PACKAGES if not importlib.util.find_spec(name)]
    if missing:
        names = " and ".join(missing)
        return [f"not compared with open_clip: {names} missing (pip install open_clip_torch)"]
    images, tokens = parity_inputs(weights)
    wanted = _library_activations(Path(path), model_settings(_config_of(weights)), images, tokens)
    return activation_lines(activations(weights, images, tokens), wanted, "open_clip")


def _config_of(weights: Weights) -> TwoTowersConfig:
    if not isinstance(weights.config, TwoTowersConfig):
        raise UserError(f"open_clip has no class for a {weights.model} of ours")
    return weights.config


def _read(path: Path) -> FlatArrays:
    arrays = read_tensors(path, _STEMS)
    if "text.token_embedding.weight" in arrays:  # CustomTextCLIP keeps the text encoder apart
        arrays = {name.removeprefix("text."): x for name, x in arrays.items()}
    for name in ("logit_scale", "logit_bias"):
        if name in arrays and arrays[name].shape == (1,):
            arrays[name] = arrays[name].reshape(())
    return arrays


def _table(config: TwoTowersConfig, shapes: Shapes) -> Table:
    table = torch_table(shapes, _MODULES, _STACKS)
    table |= {name: leaf for name, leaf in _ARRAYS.items() if leaf.path in shapes}
    rows = (slice(config.vocab_size),)
    return used_rows(table, {"text_encoder/token_embedding/embedding": rows})


def _library_activations(
    path: Path, settings: dict[str, Any], images_BHWC: np.ndarray, tokens_BL: np.ndarray
) -> dict[str, np.ndarray]:
    """What open_clip's class computes of the file."""
    torch, open_clip = (importlib.import_module(name) for name in _PACKAGES)
    model = open_clip.model.CLIP(**settings).eval()
    state = {name: torch.tensor(x).float() for name, x in _read(path).items()}
    model.load_state_dict(state)
    with torch.inference_mode():
        image = model.encode_image(torch.tensor(images_BHWC.transpose(0, 3, 1, 2)), normalize=True)
        text = model.encode_text(torch.tensor(tokens_BL).long(), normalize=True)
        logits = model.logit_scale.exp() * image @ text.T
        logits += 0 if model.logit_bias is None else model.logit_bias
    found = {"image embedding": image, "text embedding": text, "logits": logits}
    return {name: x.numpy() for name, x in found.items()}
