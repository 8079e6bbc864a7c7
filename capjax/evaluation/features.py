"""Frozen features of the images of a source, computed once for a checkpoint and kept on disk."""

import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from capjax.checkpoint.digest import params_digest
from capjax.data.images import ImagePreprocessing
from capjax.data.records import CorruptRecord
from capjax.data.sources import Source
from capjax.dims import Array, Params
from capjax.errors import UserError
from capjax.evaluation.every_row import ImageRows, map_images
from capjax.models.towers import Towers
from capjax.training.storage import warn
from capjax.training.workdir import write_atomic

# The mean over the encoder's patches; what the model pools from them; that, in the space of texts.
KINDS = ("patch_mean", "pooled", "embedding")
_SAMPLED = 16  # examples whose bytes stand for a source's content


def frozen_features(
    towers: Towers,
    params: Params,
    source: tuple[str, Source],
    preprocessing: ImagePreprocessing,
    *,
    mesh: Mesh,
    kind: str = "patch_mean",
    batch_size: int = 128,
    max_examples: int | None = None,
    directory: epath.Path | None = None,
) -> ImageRows:
    """Float32 features [N, D] of every image of `source` (what was opened, and the source).

    Args:
      kind: one of `KINDS`. "pooled" is the feature before any projection, by the model's own head;
        "embedding" has length 1.
      directory: where features are kept, usually features/ of the workdir; None: nowhere.

    What is kept is found again by the digest of the parameters, the model, the preprocessing and
    the packages that do it, and the source: its name, its size and some of its examples. Where
    other examples were changed, delete the directory.

    Raises `UserError` for another kind, for an embedding of a model that has none, and for
    features that are not finite.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    if kind == "embedding" and towers.embedder is None:
        raise UserError("kind='embedding': this model has no contrastive towers; use 'patch_mean'")

    def make() -> ImageRows:
        rows = map_images(
            lambda images: _features(towers, kind, params, images),
            source[1],
            preprocessing,
            mesh=mesh,
            batch_size=batch_size,
            max_examples=max_examples,
        )
        if not np.isfinite(rows.values).all():
            raise UserError(f"{source[0]}: features are not finite; the training has diverged")
        return rows

    if directory is None:
        return make()
    numerics = ("attention", "scan", "remat")  # how, not what
    models = {
        name: {field: value for field, value in fields.items() if field not in numerics}
        for name, fields in towers.to_dict().items()
    }
    described = {
        "kind": kind,
        "params": params_digest(params),
        "model": models,
        "preprocessing": [repr(preprocessing), preprocessing.made_by()],
        "source": [source[0], len(source[1]), _fingerprint(source[1])],
        "max_examples": max_examples,
    }
    return kept(directory, described, make)


def kept(directory: epath.Path, described: Any, make: Callable[[], ImageRows]) -> ImageRows:
    """What `make` returns, or returned when it was last `described` so (as JSON has it).

    The first process writes, whole files only; a file is read only where every process can read it.
    Where it cannot be written a warning says so: what was made is no worse for it.
    """
    name = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
    path = directory / f"{name}.npz"
    found = _load(path)
    if multihost_utils.process_allgather(np.array(found is not None)).all() and found is not None:
        return found
    rows = make()
    if jax.process_index() == 0:
        keys = json.dumps(rows.keys)  # ASCII, whatever characters they have
        content = io.BytesIO()
        np.savez(
            content,
            values=rows.values,
            labels_N=rows.labels_N,
            keys=np.frombuffer(keys.encode(), np.uint8),
            unreadable=np.array(rows.unreadable),
        )
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content.getvalue())
        except OSError as error:
            warn(f"features cannot be kept in {directory} ({error.strerror or error})")
    return rows


@functools.partial(jax.jit, static_argnums=(0, 1))
def _features(towers: Towers, kind: str, params: Params, images_BHWC: Array) -> Array:
    if kind == "patch_mean":
        patches_BPD = towers.encode_image(params, images_BHWC).astype(jnp.float32)
        return jnp.mean(patches_BPD, axis=1)
    model = towers.embedder or towers.models[0]
    memory_BPD = model.encode(params, images_BHWC)
    if kind == "pooled":
        return model.pooled(params, memory_BPD).astype(jnp.float32)
    return model.embed_image(params, memory_BPD)


def _fingerprint(source: Source) -> str:
    """Of examples evenly spread over the source."""
    count = min(_SAMPLED, len(source))
    state = hashlib.sha256()
    for i in range(count):
        try:
            example = source[i * (len(source) - 1) // max(count - 1, 1)]
        except CorruptRecord as error:
            state.update(repr(error).encode())
            continue
        about = (example.key, example.label, example.captions[:1])
        state.update(repr(about).encode() + hashlib.sha256(example.image).digest())
    return state.hexdigest()


def _load(path: epath.Path) -> ImageRows | None:
    """None where there is no whole file."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            values, labels_N, keys, unreadable = (file[name] for name in ImageRows._fields)
            return ImageRows(values, labels_N, tuple(json.loads(keys.tobytes())), int(unreadable))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
