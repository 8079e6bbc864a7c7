"""The formats by name, and which of them is at a path. Imports nothing that takes time."""

import re
from pathlib import Path

from capjax.errors import UserError

# Where the `read`, `write` and `compare` of each are.
FORMATS = {
    "capjax": "capjax.interop.native",
    "big_vision": "capjax.interop.big_vision",
    "huggingface": "capjax.interop.huggingface",
    "open_clip": "capjax.interop.open_clip",
}
# Which options say what the files of a format do not.
READ_OPTIONS = {
    "capjax": ("model",),
    "big_vision": ("image_size", "text_length"),
    "huggingface": ("image_size",),
    "open_clip": ("activation",),
}


def detect(path: str) -> str:
    """The format of an input, by its name and by what is there. Raises `UserError`."""
    if re.search(r"\.npz(:[\w/]+)?$", path):
        return "big_vision"
    if "://" in path:
        return "capjax"
    given = Path(path)
    if given.suffix in (".pt", ".pth", ".bin", ".safetensors"):
        return "open_clip"
    if not given.is_dir():
        was = "is a file of no known kind" if given.exists() else "is not there"
        raise UserError(f"--input={path} {was}; expected what --help lists, or give --from")
    has = {name for name in ("config.json", "model.safetensors") if (given / name).exists()}
    if (given / "open_clip_config.json").exists() and "model.safetensors" not in has:
        return "open_clip"
    if "config.json" in has and not (given / "checkpoints").exists():
        return "huggingface"
    return "capjax"
