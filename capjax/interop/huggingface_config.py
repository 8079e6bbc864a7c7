"""Hugging Face's `config.json` and `preprocessor_config.json` in our terms, and back.

Source: the configuration and image processor classes of transformers 5 (`models/clip`, `siglip`,
`siglip2`, `vit`), whose defaults hold for what a file leaves out.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capjax.data.tokenizer import PAD_ID
from capjax.errors import UserError
from capjax.interop.mapping import GEMMA_TOKENS
from capjax.interop.tensor_files import read_json
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.two_towers import TwoTowersConfig

Fields = dict[str, Any]

_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_BASE: Fields = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
}
_CLIP: Fields = {**_BASE, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_CLIP_TEXT: Fields = {
    **_CLIP,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
_SIGLIP: Fields = {**_BASE, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_SIGLIP_TEXT: Fields = {
    **_SIGLIP,
    "vocab_size": 32000,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
# What each class takes for what its file does not say, of images and of text.
_DEFAULTS: dict[str, tuple[Fields, Fields]] = {
    "clip": (_CLIP, _CLIP_TEXT),
    "siglip": (_SIGLIP, _SIGLIP_TEXT),
    "siglip2": ({**_SIGLIP, "num_patches": 256}, _SIGLIP_TEXT),
    "vit": ({**_BASE, "hidden_act": "gelu", "layer_norm_eps": 1e-12}, {}),
}
# What each class is among our models.
_ENCODER: Fields = {"posemb": "learn", "num_registers": 0, "qk_norm": False}
ARCHITECTURES: dict[str, Fields] = {
    "clip": _ENCODER
    | {"pool": "tok", "pre_norm": True, "text_causal": True, "text_pool": "eos"}
    | {"image_projection": True, "text_projection_bias": False, "logit_bias_init": None},
    "siglip": _ENCODER
    | {"pool": "map", "pre_norm": False, "text_causal": False, "text_pool": "last"}
    | {"image_projection": False, "text_projection_bias": True},
    "vit": _ENCODER | {"pool": "tok", "pre_norm": False},
}


def read_config(directory: Path, image_size: int | None = None) -> tuple[str, Fields]:
    """The model type and the fields of our configuration that `config.json` tells.

    `image_size` is as in `huggingface.read`; the one that comes out is theirs, of which patches may
    leave a rest. Raises `UserError` for a model that we do not have.
    """
    found = read_json(directory / "config.json")
    kind = found.get("model_type")
    if kind not in _DEFAULTS:
        raise UserError(f"config.json: model_type={kind!r}: choose one of {tuple(_DEFAULTS)}")
    if kind == "vit":
        return kind, _image_fields(_DEFAULTS[kind][0] | found) | ARCHITECTURES[kind]
    image, text = (
        defaults | (found.get(f"{part}_config") or {}) | (found.get(f"{part}_config_dict") or {})
        for part, defaults in zip(("vision", "text"), _DEFAULTS[kind], strict=True)
    )
    for name in ("hidden_act", "layer_norm_eps"):
        if text[name] != image[name]:
            raise UserError(
                f"config.json: {name} is {image[name]!r} for images and {text[name]!r} for text: "
                "expected the same for both"
            )
    if kind == "siglip2":
        image["image_size"] = _fixed_size(image, image_size)
    fields = _image_fields(image) | _text_fields(text)
    if kind == "clip":
        # Files from before transformers 4.31 say 2 and mean the highest token: the end of a text.
        end = text["vocab_size"] - 1 if text["eos_token_id"] == 2 else text["eos_token_id"]
        # Nothing after the end is seen, so padding may stay what it is: 0, a token like others.
        fields |= {"eos_id": end, "text_pad_id": 0}
        return kind, fields | {"embedding_dim": found.get("projection_dim", 512)} | ARCHITECTURES[
            kind
        ]
    size = text.get("projection_size") or text["hidden_size"]
    fields |= {"text_pad_id": _pad_id(directory, text), "embedding_dim": size}
    return kind, fields | ARCHITECTURES["siglip"]


def write_config(kind: str, config: ImageEncoderConfig, image_size: int) -> dict[str, Any]:
    """`config.json` of a model of ours: the inverse of `read_config`, but for "siglip2"."""
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    shared: Fields = {
        "hidden_act": activations[config.activation],
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
    }
    image = shared | {
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
    }
    if not isinstance(config, TwoTowersConfig):
        return image | {"model_type": "vit", "architectures": ["ViTModel"], "qkv_bias": True}
    text = shared | {
        "hidden_size": config.text_width,
        "intermediate_size": config.text_mlp_dim,
        "num_hidden_layers": config.text_depth,
        "num_attention_heads": config.text_num_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.text_length,
        "pad_token_id": config.text_pad_id,
        "bos_token_id": None,
        "eos_token_id": config.eos_id,
    }
    if kind == "clip":
        top = {"architectures": ["CLIPModel"], "projection_dim": config.embedding_dim}
        text["projection_dim"] = image["projection_dim"] = config.embedding_dim
    else:
        top = {"architectures": ["SiglipModel"]}
        text["projection_size"] = config.embedding_dim
    image["model_type"], text["model_type"] = f"{kind}_vision_model", f"{kind}_text_model"
    return top | {"model_type": kind, "text_config": text, "vision_config": image}


def _image_fields(image: Mapping[str, Any]) -> Fields:
    if image["num_channels"] != 3:
        raise UserError(f"config.json: num_channels={image['num_channels']}: expected 3")
    if image["hidden_act"] not in _ACTIVATIONS:
        choices = tuple(_ACTIVATIONS)
        raise UserError(f"config.json: hidden_act={image['hidden_act']!r}: choose one of {choices}")
    return {
        "image_size": _square(image, "image_size"),
        "patch_size": _square(image, "patch_size"),
        "width": image["hidden_size"],
        "depth": image["num_hidden_layers"],
        "num_heads": image["num_attention_heads"],
        "mlp_dim": image["intermediate_size"],
        "activation": _ACTIVATIONS[image["hidden_act"]],
        "norm_eps": image["layer_norm_eps"],
    }


def _text_fields(text: Mapping[str, Any]) -> Fields:
    return {
        "vocab_size": text["vocab_size"],
        "text_length": text["max_position_embeddings"],
        "text_width": text["hidden_size"],
        "text_depth": text["num_hidden_layers"],
        "text_num_heads": text["num_attention_heads"],
        "text_mlp_dim": text["intermediate_size"],
    }


def _square(image: Mapping[str, Any], name: str) -> int:
    size = image[name]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"config.json: {name}={size}: expected a square")
    return sides.pop()


def _pad_id(directory: Path, text: Mapping[str, Any]) -> int:
    """The token that fills texts up: the end of text in SigLIP, one of its own in SigLIP 2.

    transformers writes 1 as `pad_token_id` for both, so what the tokenizer's file says counts more;
    where there is none, Gemma's vocabulary tells SigLIP 2.
    """
    path = directory / "tokenizer_config.json"
    found = read_json(path) if path.exists() else {}
    pad, end = (_content(found.get(f"{name}_token")) for name in ("pad", "eos"))
    if pad and end:
        return _SIGLIP_TEXT["pad_token_id"] if pad == end else PAD_ID
    return PAD_ID if text["vocab_size"] == GEMMA_TOKENS else text["pad_token_id"]


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _fixed_size(image: Mapping[str, Any], image_size: int | None) -> int:
    """Pixels of the square that a Siglip2Model's own grid of positions covers."""
    side = math.isqrt(image["num_patches"])
    if side**2 != image["num_patches"]:
        raise UserError(f"config.json: num_patches={image['num_patches']}: expected a square")
    size = side * image["patch_size"]
    if image_size is None:
        raise UserError(
            "Siglip2Model takes images of any shape (NaFlex), which is not supported; give "
            f"image_size={size} to use it on its square grid, or take a checkpoint of a fixed size"
        )
    return size
