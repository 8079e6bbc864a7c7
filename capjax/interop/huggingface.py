"""Directories of Hugging Face in and out: CLIP, SigLIP, SigLIP 2 of a fixed resolution, ViT.

Read and written without torch and transformers: safetensors, `config.json` and
`preprocessor_config.json`. Source of names and function: transformers 5, `models/clip`, `siglip`,
`siglip2`, `vit`. What differs in form and not in function:

  - our class token has no position: theirs is added to it, and written as zeros;
  - CLIP has no bias where it embeds patches: ours is 0, and added to their positions when written;
  - Siglip2Model embeds patches by a Linear where SiglipModel has a convolution: read, not written.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from capjax.data.tokenizer import Tokenizer
from capjax.errors import UserError
from capjax.interop.huggingface_compare import compare
from capjax.interop.huggingface_config import ARCHITECTURES, read_config, write_config
from capjax.interop.huggingface_images import read_preprocessing, write_preprocessing
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
from capjax.interop.tensor_files import read_tensors, write_tensors
from capjax.interop.torch_names import fold_class_token, torch_table, unfold_class_token
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.image_tower import ImageTower
from capjax.models.two_towers import TwoTowers, TwoTowersConfig

__all__ = ["compare", "read", "write"]

_BLOCK = (
    ("layer_norm1", "attention_norm", None),
    ("self_attn.q_proj", "attention/qkv", 0),
    ("self_attn.k_proj", "attention/qkv", 1),
    ("self_attn.v_proj", "attention/qkv", 2),
    ("self_attn.out_proj", "attention/out", None),
    ("layer_norm2", "mlp_norm", None),
    ("mlp.fc1", "mlp/up", None),
    ("mlp.fc2", "mlp/down", None),
)
_TOWERS = (
    ("vision_model.embeddings.patch_embedding", "encoder/patch_embedding", None),
    ("vision_model.pre_layrnorm", "encoder/pre_norm", None),  # their spelling
    ("vision_model.post_layernorm", "encoder/norm", None),
    ("vision_model.head.attention.in_proj[query]", "image_head/pool/attention/query", None),
    ("vision_model.head.attention.in_proj[key]", "image_head/pool/attention/key_value", 0),
    ("vision_model.head.attention.in_proj[value]", "image_head/pool/attention/key_value", 1),
    ("vision_model.head.attention.out_proj", "image_head/pool/attention/out", None),
    ("vision_model.head.layernorm", "image_head/pool/norm", None),
    ("vision_model.head.mlp.fc1", "image_head/pool/mlp/up", None),
    ("vision_model.head.mlp.fc2", "image_head/pool/mlp/down", None),
    ("visual_projection", "image_head/projection", None),
    ("text_model.embeddings.token_embedding", "text_encoder/token_embedding", None),
    ("text_model.final_layer_norm", "text_encoder/norm", None),
)
_VIT_BLOCK = (
    ("layernorm_before", "attention_norm", None),
    ("attention.attention.query", "attention/qkv", 0),
    ("attention.attention.key", "attention/qkv", 1),
    ("attention.attention.value", "attention/qkv", 2),
    ("attention.output.dense", "attention/out", None),
    ("layernorm_after", "mlp_norm", None),
    ("intermediate.dense", "mlp/up", None),
    ("output.dense", "mlp/down", None),
)
_VIT = (
    ("embeddings.patch_embeddings.projection", "encoder/patch_embedding", None),
    ("layernorm", "encoder/norm", None),
)
# In one array, which is cut into three before it is looked up.
_PACKED = "vision_model.head.attention.in_proj"
_PARTS = ("query", "key", "value")
_NAMES = {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
    "vit": "ViTModel",
}


def read(path: str | Path, **fields: Any) -> Weights:
    """The model in a directory.

    Args:
      path: with `config.json` and `model.safetensors` (or the parts that its index names).
      **fields: of the configuration, before what the files tell: dtype, remat, scan, attention.
        A Siglip2Model needs `image_size`: that it be given is the consent to a square of that size
        or another; the model comes with the size of its own grid, whatever is given.

    Raises `UserError` with the whole difference where names or shapes are not what `config.json`
    says.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"{directory}: expected a directory with config.json and model.safetensors")
    try:
        kind, model, preprocessing, notes = _described(directory, fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory}: config.json or preprocessor_config.json holds what transformers does "
            f"not write ({type(error).__name__}: {error})"
        ) from error
    config, shapes = model.config, shapes_of(model.abstract_params())
    arrays = _without(read_tensors(directory), kind, notes)
    _to_form_of_ours(arrays, kind)
    params = fill(
        _table(kind, config, shapes), arrays, shapes, f"a {_NAMES[kind]} as config.json says"
    )
    what = "image_encoder" if kind == "vit" else "two_towers"
    tokenizer = b"" if kind == "vit" else _tokenizer_model(directory, notes)
    return Weights(what, config, params, tuple(notes), preprocessing, tokenizer)


def _described(
    directory: Path, fields: dict[str, Any]
) -> tuple[str, ImageTower | TwoTowers, dict[str, Any], list[str]]:
    """The model type, the model, its preprocessing and notes, as the directory's JSON says."""
    kind, told = read_config(directory, fields.get("image_size"))
    preprocessing, statistics, notes = read_preprocessing(directory, kind, told["image_size"])
    rest = told["image_size"] % told["patch_size"]
    if rest:  # their convolution does not read it
        preprocessing["resize_to"] = told["image_size"]
        told["image_size"] = preprocessing["image_size"] = told["image_size"] - rest
    fields = told | statistics | {k: x for k, x in fields.items() if k != "image_size"}
    if kind == "vit":
        return kind, ImageTower(ImageEncoderConfig(**fields)), preprocessing, notes
    return kind, TwoTowers(TwoTowersConfig(**fields)), preprocessing, notes


def write(path: str | Path, weights: Weights) -> None:
    """Writes a directory that transformers reads: CLIPModel, SiglipModel or ViTModel.

    Raises `UserError` where none of them computes what the model does.
    """
    kind = _kind_of(weights)
    arrays = dict(export(_table(kind, weights.config, shapes_of(weights.params)), weights.params))
    _to_form_of_theirs(arrays, kind)
    size = weights.preprocessing.get("resize_to") or weights.config.image_size
    files = {
        "preprocessor_config.json": write_preprocessing(
            kind, weights.config, weights.preprocessing
        ),
        "config.json": write_config(kind, weights.config, size),
    }
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / "model.safetensors", arrays)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    if weights.tokenizer_model:
        name = "tokenizer.json" if weights.tokenizer_model[:1] == b"{" else "spiece.model"
        (directory / name).write_bytes(weights.tokenizer_model)


def _kind_of(weights: Weights) -> str:
    """The model type whose class computes what this model does. Raises `UserError` if none does."""
    config = vars(weights.config)
    kinds = {"image_encoder": ("vit",), "two_towers": ("clip", "siglip")}.get(weights.model)
    if kinds is None:
        raise UserError(f"Hugging Face has no class for a {weights.model} of ours")
    differences = {}
    for kind in kinds:
        wrong = [
            f"{name}={value!r} (is {config[name]!r})"
            for name, value in ARCHITECTURES[kind].items()
            if config[name] != value
        ]
        if kind == "siglip" and config["logit_bias_init"] is None:
            wrong.append("a logit bias (there is none)")
        if kind == "clip" and config["eos_id"] == 2:
            wrong.append("eos_id other than 2, which stands for the highest token there")
        if not wrong:
            return kind
        differences[kind] = wrong
    nearest = min(differences, key=lambda kind: len(differences[kind]))
    raise UserError(
        f"Hugging Face has no class for this model; the nearest, {_NAMES[nearest]}, needs "
        f"{', '.join(differences[nearest])}"
    )


def _table(kind: str, config: ImageEncoderConfig, shapes: Shapes) -> Table:
    if not isinstance(config, TwoTowersConfig):
        return torch_table(shapes, _VIT, {"encoder.layer.{}": ("encoder/blocks", _VIT_BLOCK)}) | {
            "embeddings.position_embeddings": Leaf("encoder/position_embedding"),
            "embeddings.cls_token": Leaf("encoder/class_token"),
        }
    projection = "text_projection" if kind == "clip" else "text_model.head"
    stacks: dict[str, tuple[str, Modules]] = {
        "vision_model.encoder.layers.{}": ("encoder/blocks", _BLOCK),
        "text_model.encoder.layers.{}": ("text_encoder/blocks", _BLOCK),
    }
    modules = (*_TOWERS, (projection, "text_encoder/projection", None))
    table = torch_table(shapes, modules, stacks)
    one = () if kind == "clip" else ((),)  # a scalar there, one number in an array here
    arrays = {
        "vision_model.embeddings.class_embedding": Leaf("encoder/class_token"),
        "vision_model.embeddings.position_embedding.weight": Leaf("encoder/position_embedding"),
        "vision_model.head.probe": Leaf("image_head/pool/probe", groups=((), (0,), (1,))),
        "text_model.embeddings.position_embedding.weight": Leaf("text_encoder/position_embedding"),
        "logit_scale": Leaf("contrastive/logit_scale", groups=one),
        "logit_bias": Leaf("contrastive/logit_bias", groups=one),
    }
    table |= {name: leaf for name, leaf in arrays.items() if leaf.path in shapes}
    if kind == "siglip2":  # flattened patches: rows, columns, channels
        name = "vision_model.embeddings.patch_embedding.weight"
        table[name] = table[name]._replace(groups=((3,), (0, 1, 2)))
    rows = (slice(config.vocab_size),)
    return used_rows(table, {"text_encoder/token_embedding/embedding": rows})


def _without(arrays: FlatArrays, kind: str, notes: list[str]) -> FlatArrays:
    """The arrays that are of the encoders."""
    # Counters that files from before transformers 4.31 hold.
    arrays = {name: x for name, x in arrays.items() if not name.endswith(".position_ids")}
    if kind != "vit":
        return arrays
    arrays = {name.removeprefix("vit."): x for name, x in arrays.items()}
    heads = sorted(name for name in arrays if name.startswith(("pooler.", "classifier.")))
    if heads:
        notes.append(f"left out, not of the encoder: {', '.join(heads)}")
    return {name: x for name, x in arrays.items() if name not in heads}


def _to_form_of_ours(arrays: FlatArrays, kind: str) -> None:
    """Theirs under the names of the table, in place."""
    if kind == "vit":
        fold_class_token(arrays, "embeddings.cls_token", "embeddings.position_embeddings")
    elif kind == "clip":
        embeddings = "vision_model.embeddings"
        fold_class_token(
            arrays, f"{embeddings}.class_embedding", f"{embeddings}.position_embedding.weight"
        )
        kernel = arrays.get(f"{embeddings}.patch_embedding.weight")
        if kernel is not None:
            zeros = np.zeros(len(kernel), np.float32)
            arrays.setdefault(f"{embeddings}.patch_embedding.bias", zeros)
    else:
        for leaf in ("weight", "bias"):
            packed = arrays.get(f"{_PACKED}_{leaf}")
            if packed is not None and len(packed) % 3 == 0:
                del arrays[f"{_PACKED}_{leaf}"]
                for part, x in zip(_PARTS, np.split(packed, 3), strict=True):
                    arrays[f"{_PACKED}[{part}].{leaf}"] = x


def _to_form_of_theirs(arrays: FlatArrays, kind: str) -> None:
    """The inverse of `_to_form_of_ours`."""
    if kind == "vit":
        unfold_class_token(arrays, "embeddings.cls_token", "embeddings.position_embeddings")
        for name in ("embeddings.cls_token", "embeddings.position_embeddings"):
            arrays[name] = arrays[name].reshape(1, -1, arrays[name].shape[-1])
    elif kind == "clip":
        token, positions, bias = (
            f"vision_model.embeddings.{name}"
            for name in ("class_embedding", "position_embedding.weight", "patch_embedding.bias")
        )
        arrays[positions] = arrays[positions] + arrays.pop(bias)
        unfold_class_token(arrays, token, positions)
        arrays[token] = arrays[token].reshape(-1)
    else:
        for leaf in ("weight", "bias"):
            parts = [arrays.pop(f"{_PACKED}[{part}].{leaf}") for part in _PARTS]
            arrays[f"{_PACKED}_{leaf}"] = np.concatenate(parts)


def _tokenizer_model(directory: Path, notes: list[str]) -> bytes:
    """The tokenizer of a directory, if it has one that we read."""
    for name in ("spiece.model", "tokenizer.json"):
        if (directory / name).exists():
            try:
                return Tokenizer.from_file(directory / name).model_bytes
            except UserError as error:
                notes.append(f"without its tokenizer: {error}")
    return b""
