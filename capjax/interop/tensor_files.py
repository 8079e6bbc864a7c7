"""PyTorch's weight files: safetensors without torch, pickled ones where torch is installed."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes  # noqa: F401  with it numpy, and so safetensors, knows bfloat16
import numpy as np

from capjax.errors import UserError
from capjax.interop.mapping import FlatArrays

PICKLED = (".bin", ".pt", ".pth")


def read_tensors(
    path: str | Path, stems: tuple[str, ...] = ("model", "pytorch_model")
) -> FlatArrays:
    """The arrays by name, in the types they are stored in.

    Args:
      path: a `.safetensors` file, a pickled one (`.bin`, `.pt`, `.pth`), or a directory.
      stems: how the file in a directory may be called, without its suffix; or the `.index.json`
        that names its parts.

    Raises `UserError` where nothing readable is there, or the package to read it is missing.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_file(path)
    for suffix in (".safetensors", *PICKLED):
        for stem in stems:
            file = path / f"{stem}{suffix}"
            if file.exists():
                return _read_file(file)
            index = path / f"{stem}{suffix}.index.json"
            if index.exists():
                parts = [_read_file(path / part) for part in _parts(index)]
                return {name: x for part in parts for name, x in part.items()}
    names = ", ".join(f"{stem}.safetensors" for stem in stems)
    raise UserError(f"{path}: no weights there; expected {names}")


def write_tensors(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a `.safetensors` file as PyTorch's programs do."""
    contiguous = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    # Some readers refuse a file that does not say whose tensors it holds.
    need_package("safetensors.numpy", "huggingface").save_file(contiguous, path, {"format": "pt"})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `UserError` where it is missing or is none."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object")
    return found


def need_package(name: str, extra: str) -> ModuleType:
    """The module `name`. Raises `UserError` naming the extra to install where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(
            f"this needs the package {package}: pip install 'capjax[{extra}]'"
        ) from error


def _parts(index: Path) -> list[str]:
    """The files beside `index` that it names. Raises `UserError` for one that lies elsewhere."""
    named = read_json(index).get("weight_map")
    files = sorted({str(part) for part in named.values()}) if isinstance(named, dict) else []
    if not files or any(Path(part).name != part for part in files):
        raise UserError(f"{index}: expected a weight_map of the names of files beside it")
    return files


def _read_file(path: Path) -> FlatArrays:
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        safetensors = need_package("safetensors.numpy", "huggingface")
        try:
            return safetensors.load_file(path)
        except Exception as error:  # the library's own kind, and OSError, ValueError, TypeError
            raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    if path.suffix in PICKLED:
        return _read_pickled(path)
    choices = ", ".join((".safetensors", *PICKLED))
    raise UserError(f"{path}: expected a directory or a file that ends in one of {choices}")


def _read_pickled(path: Path) -> FlatArrays:
    """The tensors of a state dict, perhaps of a training checkpoint of open_clip's."""
    torch = need_package("torch", "parity")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's and torch's many kinds
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a plain file of tensors ({first})") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    tensors = {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path}: no tensors by name in it")
    return {
        name.removeprefix("module."): (x.float() if x.is_floating_point() else x).numpy()
        for name, x in tensors.items()
    }
