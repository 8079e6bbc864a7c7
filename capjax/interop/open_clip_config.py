"""open_clip's `open_clip_config.json`, and what shapes alone tell, in our terms, and back.

Source: `src/open_clip/model.py` and `transform.py` of mlfoundations/open_clip.
"""

import math
from collections.abc import Mapping
from typing import Any

from capjax.data.images import ImagePreprocessing
from capjax.errors import UserError
from capjax.interop.huggingface_config import ARCHITECTURES
from capjax.interop.huggingface_images import OPENAI_MEAN, OPENAI_STD
from capjax.interop.mapping import FlatArrays
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.two_towers import TwoTowersConfig

# Of the image encoder's heads; otherwise 64, as in every text encoder.
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
_MODES = {"shortest": "crop", "squash": "stretch"}
_INTERPOLATIONS = ("bilinear", "bicubic")
WHAT = "an open_clip CLIP with a ViT and a text transformer"
_STACKS = ("visual.transformer.resblocks.", "transformer.resblocks.")


def fields_of_shapes(arrays: FlatArrays) -> dict[str, Any]:
    """The sizes, and what every model of this kind has in common."""
    needed = {
        "visual.conv1.weight": 4,
        "visual.positional_embedding": 2,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": 2,
        "visual.proj": 2,
        "token_embedding.weight": 2,
        "positional_embedding": 2,
        "transformer.resblocks.0.mlp.c_fc.weight": 2,
    }
    wrong = [
        name for name, axes in needed.items() if name not in arrays or arrays[name].ndim != axes
    ]
    if wrong:
        raise UserError(f"not the weights of {WHAT}: missing: {', '.join(wrong)}")
    patch, places, mlp, projection, tokens, text_places, text_mlp = (
        arrays[name].shape for name in needed
    )
    width, text_width = patch[0], tokens[1]
    heads = max(width // _HEAD_WIDTHS.get(width, 64), 1)
    depth, text_depth = (
        len({name.removeprefix(root).split(".")[0] for name in arrays if name.startswith(root)})
        for root in _STACKS
    )
    return (
        {
            "image_size": patch[-1] * math.isqrt(max(places[0] - 1, 0)),
            "patch_size": patch[-1],
            "width": width,
            "depth": depth,
            "num_heads": heads,
            "mlp_dim": mlp[0],
            "norm_eps": 1e-5,
            "vocab_size": tokens[0],
            "text_length": text_places[0],
            "text_width": text_width,
            "text_depth": text_depth,
            "text_num_heads": max(text_width // 64, 1),
            "text_mlp_dim": text_mlp[0],
            "embedding_dim": projection[1],
            # The text's end is found as the highest token.
            "eos_id": tokens[0] - 1,
            "text_pad_id": 0,
        }
        | ARCHITECTURES["clip"]
        | {"logit_bias_init": -10.0 if "logit_bias" in arrays else None}
    )


def fields_of_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What `model_cfg` tells beyond the shapes. Raises `UserError` for what we do not have."""
    if not settings:
        return {}
    image, text = settings.get("vision_cfg", {}), settings.get("text_cfg", {})
    choices = (
        ("vision_cfg", image, "pool_type", ("tok",)),
        ("vision_cfg", image, "norm_kwargs", (None, {})),
        ("vision_cfg", image, "act_kwargs", (None, {})),
        ("text_cfg", text, "pool_type", ("argmax", "eos")),
        ("text_cfg", text, "no_causal_mask", (False,)),
        ("text_cfg", text, "norm_kwargs", (None, {})),
        ("text_cfg", text, "act_kwargs", (None, {})),
    )
    for section, found, name, allowed in choices:
        if name in found and found[name] not in allowed:
            raise UserError(
                f"open_clip_config.json: {section}.{name}={found[name]!r}: choose one of {allowed}"
            )
    told = {
        "activation": "quick_gelu" if settings.get("quick_gelu") else "gelu",
        "num_heads": image.get("width", 768) // image.get("head_width", 64),
        "text_num_heads": text.get("heads", 8),
    }
    if text.get("pool_type") == "eos":
        told["eos_id"] = text.get("eos_id", 2)
    return told


def model_settings(config: TwoTowersConfig) -> dict[str, Any]:
    """The `model_cfg` of `open_clip_config.json`. Raises `UserError` for another model."""
    wrong = [
        f"{name}={value!r} (is {getattr(config, name)!r})"
        for name, value in (ARCHITECTURES["clip"] | {"norm_eps": 1e-5}).items()
        if name != "logit_bias_init" and getattr(config, name) != value
    ]
    if config.activation not in ("gelu", "quick_gelu"):
        wrong.append(f"activation='gelu' or 'quick_gelu' (is {config.activation!r})")
    if wrong:
        raise UserError(f"open_clip has no such model; it needs {', '.join(wrong)}")
    image = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "width": config.width,
        "layers": config.depth,
        "head_width": config.width // config.num_heads,
        "mlp_ratio": _ratio(config.mlp_dim, config.width),
    }
    text = {
        "context_length": config.text_length,
        "vocab_size": config.vocab_size,
        "width": config.text_width,
        "layers": config.text_depth,
        "heads": config.text_num_heads,
        "mlp_ratio": _ratio(config.text_mlp_dim, config.text_width),
    }
    if config.eos_id != config.vocab_size - 1:
        text |= {"pool_type": "eos", "eos_id": config.eos_id}
    bias = {} if config.logit_bias_init is None else {"init_logit_bias": config.logit_bias_init}
    quick = {"quick_gelu": config.activation == "quick_gelu"}
    towers = {"vision_cfg": image, "text_cfg": text}
    return {"embed_dim": config.embedding_dim} | quick | bias | towers


def _ratio(hidden: int, width: int) -> float:
    """What `int(width * ratio)` makes `hidden` of again."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def read_preprocessing(
    settings: dict[str, Any], image_size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `ImagePreprocessing`, and those of the configuration."""
    found: dict[str, Any] = {"resize_mode": "shortest", "interpolation": "bicubic"}
    found |= {"size": image_size, "mean": OPENAI_MEAN, "std": OPENAI_STD} | settings
    square = (image_size, [image_size] * 2)
    allowed = {"size": square, "resize_mode": tuple(_MODES), "interpolation": _INTERPOLATIONS}
    for name, choices in allowed.items():
        if found[name] not in choices:
            raise UserError(
                f"open_clip_config.json: {name}={found[name]!r}: choose one of {choices}"
            )
    preprocessing = {"image_size": image_size, "mode": _MODES[found["resize_mode"]]}
    preprocessing |= {"antialias": True, "resample": found["interpolation"], "exact": True}
    return preprocessing, {"image_mean": tuple(found["mean"]), "image_std": tuple(found["std"])}


def write_preprocessing(
    config: ImageEncoderConfig, preprocessing: Mapping[str, Any]
) -> dict[str, Any]:
    """`preprocess_cfg` for these settings; those not given are open_clip's own.

    Raises `UserError` for preprocessing that open_clip does not have.
    """
    given: dict[str, Any] = {"image_size": config.image_size, "mode": "crop", "resample": "bicubic"}
    wanted = ImagePreprocessing(**given | dict(preprocessing))
    modes = {ours: theirs for theirs, ours in _MODES.items()}
    has_size = wanted.image_size == config.image_size == (wanted.resize_to or wanted.image_size)
    if not wanted.antialias or wanted.mode not in modes or not has_size:
        raise UserError(f"open_clip has no such preprocessing: {wanted}")
    return {
        "size": config.image_size,
        "resize_mode": modes[wanted.mode],
        "interpolation": wanted.resample,
        "mean": list(config.image_mean),
        "std": list(config.image_std),
    }
