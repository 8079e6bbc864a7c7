"""Our own checkpoints, read and written as the other formats are."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from capjax.checkpoint import Checkpointer, RunInfo, load_params
from capjax.data.images import ImagePreprocessing
from capjax.dims import Params
from capjax.errors import UserError
from capjax.interop.mapping import Weights, model_of
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.towers import KINDS

IMAGE_ENCODER = "image_encoder"


def read(path: str | Path, *, model: str | None = None) -> Weights:
    """A model of a checkpoint: of a run's newest one, or of one that was converted.

    Args:
      path: a workdir, its `checkpoints`, or one checkpoint in it.
      model: "captioner", "two_towers", "coca", or "image_encoder" alone; needed where a run has
        several.
    """
    loaded = load_params(path)
    metadata = loaded.metadata
    try:
        configs = {
            kind: _config(kind, stored) for kind, stored in metadata["config"]["model"].items()
        }
        preprocessing = dataclasses.asdict(ImagePreprocessing(**metadata["preprocessing"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not describe a model of this version of capjax ({error}); it was "
            f"written by capjax {metadata['versions'].get('capjax')}"
        ) from error
    if not configs:
        raise UserError(f"{path} holds no model")
    kind = _choose(model, tuple(configs))
    config = configs.get(kind) or _image_config(next(iter(configs.values())), loaded.params)
    names = model_of(config).abstract_params()
    params = jax.device_get({name: loaded.params[name] for name in names})
    return Weights(kind, config, params, (), preprocessing, loaded.tokenizer_model)


def write(path: str | Path, weights: Weights, step: int = 0) -> None:
    """A directory with one checkpoint, of parameters alone."""
    preprocessing: dict[str, Any] = {**weights.preprocessing}
    preprocessing["image_size"] = weights.config.image_size
    info = RunInfo(
        config={"model": {weights.model: dataclasses.asdict(weights.config)}},
        preprocessing=dataclasses.asdict(ImagePreprocessing(**preprocessing)),
        tokenizer_model=weights.tokenizer_model,
    )
    with Checkpointer(path, info) as checkpointer:
        checkpointer.save(step, {"params": weights.params}, {"examples_seen": 0})


def _config(kind: str, fields: dict[str, Any]) -> ImageEncoderConfig:
    return (ImageEncoderConfig if kind == IMAGE_ENCODER else KINDS[kind][1])(**fields)


def _choose(model: str | None, stored: tuple[str, ...]) -> str:
    if model is None and len(stored) == 1:
        return stored[0]
    choices = tuple(dict.fromkeys((*stored, IMAGE_ENCODER)))
    if model not in choices:
        problem = "several models" if model is None else f"no model={model}"
        raise UserError(f"the checkpoint has {problem}: choose model from {choices}")
    return model


def _image_config(config: ImageEncoderConfig, params: Mapping[str, Params]) -> ImageEncoderConfig:
    """The image encoder's part of a configuration; without its pooling head it is pooled "gap"."""
    names = [field.name for field in dataclasses.fields(ImageEncoderConfig)]
    fields = {name: getattr(config, name) for name in names}
    if config.pool == "map" and "pool" not in params.get("image_head", {}):
        fields["pool"] = "gap"
    return ImageEncoderConfig(**fields)
