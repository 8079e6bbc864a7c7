"""Hugging Face's `preprocessor_config.json` as our preprocessing and normalisation, and back.

Source: the image processors of transformers 5 for CLIP, SigLIP and ViT, whose defaults hold for
what a file leaves out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capjax.data.images import ImagePreprocessing
from capjax.errors import UserError
from capjax.interop.tensor_files import read_json
from capjax.models.image_encoder import ImageEncoderConfig

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_CLASSES = {
    "clip": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "vit": "ViTImageProcessor",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {"resample": 3, "do_center_crop": True}
    | {"image_mean": OPENAI_MEAN, "image_std": OPENAI_STD},
    "siglip": {"resample": 3, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3},
    "siglip2": {"resample": 2, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3},
    "vit": {"resample": 2, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3},
}
_ALWAYS: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
}


def read_preprocessing(
    directory: Path, kind: str, image_size: int
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What the directory says of images.

    Returns the fields of `ImagePreprocessing`, those of the model's configuration (`image_mean`,
    `image_std`), and a note where no file says it. Raises `UserError` for what we do not do.
    """
    found, notes = _read(directory)
    found = _ALWAYS | _DEFAULTS[kind] | found
    for name in ("do_resize", "do_rescale"):
        _expect(found, name, True)
    if abs(found["rescale_factor"] * 255 - 1) > 1e-6:
        _expect(found, "rescale_factor", 1 / 255)
    if found["resample"] not in _RESAMPLE:
        raise UserError(
            f"preprocessor_config.json: resample={found['resample']}: expected 2 (bilinear) or 3 "
            "(bicubic)"
        )
    crop = bool(found.get("do_center_crop"))
    wanted: dict[str, tuple[int, ...]] = {"crop_size": (image_size, image_size)} if crop else {}
    wanted["size"] = (image_size,) if crop else (image_size, image_size)
    for name, sides in wanted.items():
        if found.get(name) and _sides(found[name], len(sides)) != sides:
            raise UserError(
                f"preprocessor_config.json: {name}={found[name]} is not supported; expected "
                f"{' x '.join(map(str, sides))}, the model's image_size"
            )
    fields = {"image_size": image_size, "mode": "crop" if crop else "stretch"}
    fields |= {"antialias": True, "resample": _RESAMPLE[found["resample"]], "exact": True}
    if not found["do_normalize"]:
        found |= {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
    statistics = {
        name: tuple(float(x) for x in found[name]) for name in ("image_mean", "image_std")
    }
    return fields, statistics, notes


def write_preprocessing(
    kind: str, config: ImageEncoderConfig, preprocessing: Mapping[str, Any]
) -> dict[str, Any]:
    """`preprocessor_config.json` for these settings; those not given are the class's own.

    Raises `UserError` for preprocessing that the class does not have.
    """
    given: dict[str, Any] = {
        "image_size": config.image_size,
        "mode": "crop" if kind == "clip" else "stretch",
    }
    given |= {"resample": _RESAMPLE[_DEFAULTS[kind]["resample"]]} | dict(preprocessing)
    wanted = ImagePreprocessing(**given)
    size, patch = wanted.resize_to or wanted.image_size, config.patch_size
    has_grid = (
        wanted.image_size == config.image_size and size // patch == config.image_size // patch
    )
    if not wanted.antialias or wanted.mode == "pad" or not has_grid:
        raise UserError(
            f"{_CLASSES[kind]} has no such preprocessing: {wanted}; expected antialias=True, mode "
            f"'stretch' or 'crop', image_size={config.image_size} and less than a patch more"
        )
    square = {"height": size, "width": size}
    crop = wanted.mode == "crop"
    return {
        **_ALWAYS,
        "image_processor_type": _CLASSES[kind],
        "do_convert_rgb": True,
        "do_center_crop": crop,
        "size": {"shortest_edge": size} if crop else square,
        "crop_size": square,
        "resample": {name: number for number, name in _RESAMPLE.items()}[wanted.resample],
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }


def _read(directory: Path) -> tuple[dict[str, Any], list[str]]:
    path = directory / "preprocessor_config.json"
    if path.exists():
        return read_json(path), []
    path = directory / "processor_config.json"  # transformers 5 puts a processor's parts in one
    if path.exists() and "image_processor" in (found := read_json(path)):
        return found["image_processor"], []
    return {}, ["no preprocessor_config.json: the preprocessing is the default of its class"]


def _expect(found: Mapping[str, Any], name: str, value: Any) -> None:
    if found[name] != value:
        raise UserError(f"preprocessor_config.json: {name}={found[name]}: expected {value}")


def _sides(size: Any, number: int) -> tuple[int, ...]:
    """(shorter side,) or (height, width); a plain number, as in old files, is `number` of them."""
    if isinstance(size, int):
        return (size,) * number
    if "shortest_edge" in size:
        return (size["shortest_edge"],)
    return (size["height"], size["width"])
