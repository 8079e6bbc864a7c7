"""What transformers computes of a Hugging Face directory, beside what capjax does."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from capjax.interop.compare import activation_lines, activations, sample_inputs
from capjax.interop.mapping import Weights
from capjax.interop.tensor_files import read_json
from capjax.models.two_towers import TwoTowersConfig

_PACKAGES = ("torch", "transformers")


def compare(path: str | Path, weights: Weights) -> list[str]:
    """A line for each activation that the library's own model and `weights` both compute.

    Raises `UserError` where one differs by more than `compare.TOLERANCE`. Where torch and
    transformers are not installed, the one line says so.
    """
    missing = [name for name in _PACKAGES if not importlib.util.find_spec(name)]
    if missing:
        names = " and ".join(missing)
        return [f"not compared with transformers: {names} missing (pip install 'capjax[parity]')"]
    images, tokens = parity_inputs(weights)
    wanted = library_activations(Path(path), images, tokens)
    return activation_lines(activations(weights, images, tokens), wanted, "transformers")


def parity_inputs(weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images (2, H, W, 3), and tokens (2, L) that a causal encoder finds an end in."""
    config = weights.config
    if not isinstance(config, TwoTowersConfig):
        return sample_inputs(config.image_size)
    images, tokens = sample_inputs(config.image_size, config.text_length, config.vocab_size)
    if config.text_pool == "eos":
        # Once in each row, and in different places.
        tokens = np.where(tokens == config.eos_id, max(config.eos_id - 1, 0), tokens)
        tokens[0, config.text_length // 2] = tokens[1, -1] = config.eos_id
    return images, tokens.astype(np.int32)


def library_activations(
    directory: Path, images_BHWC: np.ndarray, tokens_BL: np.ndarray
) -> dict[str, np.ndarray]:
    """The activations of the library's model, under the names and in the order that ours have."""
    torch, transformers = (importlib.import_module(name) for name in _PACKAGES)
    kind = read_json(directory / "config.json")["model_type"]
    model = _load(transformers, directory, kind)
    size = getattr(getattr(model.config, "vision_config", model.config), "image_size", 0)
    pixels = torch.tensor(images_BHWC.transpose(0, 3, 1, 2))
    rest = max(size - pixels.shape[-1], 0)  # what their convolution does not read
    pixels = torch.nn.functional.pad(pixels, (0, rest, 0, rest), value=9.0)
    with torch.inference_mode():
        if kind == "vit":
            states = model(pixels).last_hidden_state
            found = {"image encoder": states.roll(-1, 1), "feature": states[:, 0]}
        elif kind == "clip":
            out = model(input_ids=torch.tensor(tokens_BL).long(), pixel_values=pixels)
            image = out.vision_model_output
            # They normalise the class token alone; the patches go where ours do, through the same.
            states = model.vision_model.post_layernorm(image.last_hidden_state)
            found = {"image encoder": states.roll(-1, 1), "feature": states[:, 0]}
            found |= _embeddings(out)
        else:
            inputs = (
                _patches(torch, model, pixels) if kind == "siglip2" else {"pixel_values": pixels}
            )
            out = model(input_ids=torch.tensor(tokens_BL).long(), **inputs)
            image = out.vision_model_output
            found = {"image encoder": image.last_hidden_state, "feature": image.pooler_output}
            found |= _embeddings(out)
    return {name: x.numpy() for name, x in found.items()}


def _load(transformers: ModuleType, directory: Path, kind: str) -> Any:
    """The model in float32, of which every array must come from the file."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        options = {"add_pooling_layer": False} if kind == "vit" else {}
        model, info = transformers.AutoModel.from_pretrained(
            directory, dtype="float32", output_loading_info=True, **options
        )
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
    if info["missing_keys"]:
        raise ValueError(f"transformers misses {sorted(info['missing_keys'])}")
    return model.eval()


def _embeddings(out: Any) -> dict[str, Any]:
    return {
        "image embedding": out.image_embeds,
        "text embedding": out.text_embeds,
        "logits": out.logits_per_image,
    }


def _patches(torch: ModuleType, model: Any, pixels_BCHW: Any) -> dict[str, Any]:
    """The inputs of a Siglip2Model: flattened patches, rows first, and what grid they are of."""
    size = model.config.vision_config.patch_size
    batch, channels, height, width = pixels_BCHW.shape
    grid = (height // size, width // size)
    pieces = pixels_BCHW.reshape(batch, channels, grid[0], size, grid[1], size)
    flat = pieces.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid[0] * grid[1], -1)
    return {
        "pixel_values": flat,
        "pixel_attention_mask": torch.ones(flat.shape[:2], dtype=torch.long),
        "spatial_shapes": torch.tensor([grid] * batch),
    }
