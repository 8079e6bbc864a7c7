"""What `capjax.json` says of a checkpoint, besides what its files and digests are."""

import dataclasses
import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from capjax.checkpoint.arrays import array_entry
from capjax.checkpoint.files import FORMAT_VERSION, Metadata, sha256
from capjax.dims import Array

LIBRARIES = (
    *("capjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    *("pillow", "simplejpeg", "cykooz-resizer"),
)


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What is the same in every checkpoint of a run; the mappings hold what JSON can say.

    `pixels_by`: the packages that made the training images' pixels (`ImagePreprocessing.made_by`);
    empty where they are not known, as of weights that were converted. `data`: what identifies the
    training examples (`num_examples`, and `sha256` of a few of them); empty without any.
    """

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer_model: bytes = b""
    pixels_by: Mapping[str, str] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run_metadata(run: RunInfo) -> Metadata:
    """The part that a whole run shares."""
    model = run.tokenizer_model
    return {
        "config": dict(run.config),
        "preprocessing": dict(run.preprocessing),
        "pixels_by": dict(run.pixels_by),
        "data": dict(run.data),
        "tokenizer_sha256": sha256(model) if model else None,
        "versions": library_versions(),
        "git_commit": _git_commit(),
    }


def step_metadata(step: int, leaves: Mapping[str, Array], extra: Mapping[str, Any]) -> Metadata:
    """The part of one step, of whose arrays the digests are still to come."""
    return {
        "format_version": FORMAT_VERSION,
        "step": step,
        "examples_seen": extra["examples_seen"],
        "extra": dict(extra),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "mesh": _mesh_shape(leaves),
        "process_count": jax.process_count(),
        "arrays": {name: array_entry(leaf) for name, leaf in leaves.items()},
    }


def _mesh_shape(leaves: Mapping[str, Array]) -> dict[str, int]:
    """Axis -> size of the mesh that the arrays lie on; empty without one."""
    for leaf in leaves.values():
        if isinstance(leaf.sharding, NamedSharding):
            return dict(leaf.sharding.mesh.shape)
    return {}


def library_versions() -> dict[str, str | None]:
    """Python's version and those of the libraries that a run's numbers depend on."""
    return {"python": platform.python_version(), **{k: _version(k) for k in LIBRARIES}}


def _version(name: str) -> str | None:
    """None for what is on the path without being installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of capjax's own checkout, `-dirty` where it was changed; None when installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
