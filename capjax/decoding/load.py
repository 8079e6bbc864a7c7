"""A checkpoint, ready to use: `capjax.load(path).caption(images)`."""

import os

from jax.sharding import Mesh

from capjax.checkpoint import best_step, find_steps, load_params, step_directory
from capjax.data.images import ImagePreprocessing
from capjax.data.tokenizer import Tokenizer
from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError
from capjax.models.towers import towers_from_dict
from capjax.training.storage import warn

__all__ = ["LoadedModel", "load"]


def load(
    path: str | os.PathLike, step: int | str | None = None, mesh: Mesh | None = None
) -> LoadedModel:
    """The model of a run's newest checkpoint, or of `step`: a number, or "best".

    The best is that by the run's `checkpoint.best_metric`. `path` is a workdir, its `checkpoints`
    directory, or one checkpoint in it. Without a mesh all runs on the first device. Raises
    `UserError` where there is no such checkpoint, or none whole.
    """
    if step == "best":
        step = best_step(path)
    if step is not None:
        directory, steps = find_steps(path)
        if step not in steps:
            raise UserError(f"step={step}: {path} has the steps {steps}; name one of them")
        path = step_directory(directory, step)
    loaded = load_params(path)
    config = loaded.metadata["config"]
    try:
        # Trained with an attention that this machine may lack; all of them compute the same.
        kinds = {kind: fields | {"attention": "auto"} for kind, fields in config["model"].items()}
        towers = towers_from_dict(kinds)
        preprocessing = ImagePreprocessing(**loaded.metadata["preprocessing"])
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint {path} does not describe a model of this version of capjax "
            f"({error}); it was written by capjax {loaded.metadata['versions'].get('capjax')}"
        ) from error
    if other := preprocessing.other_pixels(loaded.metadata.get("pixels_by", {})):
        warn(f"{path}: {other}")
    model = LoadedModel(
        towers=towers,
        params=loaded.params,
        stored_tokenizer=(
            Tokenizer.from_bytes(loaded.tokenizer_model) if loaded.tokenizer_model else None
        ),
        preprocessing=preprocessing,
        config=config,
        step=loaded.step,
    )
    return model if mesh is None else model.on_mesh(mesh)
