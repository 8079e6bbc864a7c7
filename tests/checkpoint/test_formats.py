"""Checkpoints that earlier versions wrote, read by this one (fixtures/checkpoint_format_1.md).

`python -m tests.checkpoint.test_formats DIRECTORY` writes one of today's format.
"""

import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from capjax.checkpoint import Checkpointer, RunInfo, load_params, verify
from capjax.checkpoint.files import FORMAT_VERSION, UPGRADES, Metadata, read_metadata
from capjax.checkpoint.metadata import LIBRARIES

FIXTURES = Path(__file__).parents[1] / "fixtures"
FORMATS = sorted(FIXTURES.glob("checkpoint_format_*/"))
STEP = 3
RUN = RunInfo(
    config={"seed": 1, "model": {"captioner": {"width": 4}}},
    preprocessing={"image_size": 8},
    tokenizer_model=b"a tokenizer",
    pixels_by={"resizer": "pillow"},
    data={"num_examples": 5, "sha256": "5" * 64},
)


def closed_form() -> dict:
    """The state: every kind of leaf that a run stores."""
    shapes = {"bias": (6,), "half": (2, 4), "kernel": (4, 6)}
    params = {
        name: jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) / 8 + place
        for place, (name, shape) in enumerate(shapes.items())
    }
    params["half"] = params["half"].astype(jnp.bfloat16)
    return {
        "step": jnp.int32(STEP),
        "params": params,
        "opt_state": {"mu": jax.tree.map(lambda x: -x, params), "mask": jnp.arange(4) % 2 == 0},
        "key": jax.random.key(7),
    }


def write(directory: str) -> None:
    """One checkpoint, as this version writes it."""
    with Checkpointer(directory, RUN) as checkpointer:
        checkpointer.save(STEP, closed_form(), {"examples_seen": 48, "metrics": {"eval/a/b": 0.5}})


def same_bits(a, b) -> bool:
    """Types and bytes of all leaves."""
    a, b = (jax.tree.map(np.asarray, tree) for tree in (a, b))
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and (x == y).all(), a, b))


@pytest.mark.parametrize("directory", FORMATS, ids=lambda path: path.name)
def test_every_format_is_read_bit_for_bit(directory, tmp_path):
    place = epath.Path(directory)
    assert verify(place, STEP) == []
    loaded = load_params(directory)
    state = closed_form()
    assert same_bits(loaded.params, state["params"])
    assert (loaded.step, loaded.tokenizer_model) == (STEP, RUN.tokenizer_model)
    metadata = loaded.metadata
    assert (metadata["format_version"], metadata["examples_seen"]) == (FORMAT_VERSION, 48)
    for name in ("config", "preprocessing", "pixels_by", "data"):
        assert metadata[name] == getattr(RUN, name)
    assert {"python", *LIBRARIES} == metadata["versions"].keys()
    assert {"git_commit", "mesh", "process_count", "created"} < metadata.keys()
    with Checkpointer(shutil.copytree(directory, tmp_path / "copy"), RUN) as checkpointer:
        step, restored, extra = checkpointer.restore_latest(jax.tree.map(jnp.zeros_like, state))
    assert (step, extra["metrics"]) == (STEP, {"eval/a/b": 0.5})
    key, restored_key = state.pop("key"), restored.pop("key")
    assert same_bits(restored, state)
    assert (jax.random.key_data(key) == jax.random.key_data(restored_key)).all()


def test_today_s_format_is_among_them():
    """Who makes a new format stores one of it."""
    assert f"checkpoint_format_{FORMAT_VERSION}" in [path.name for path in FORMATS]
    assert set(UPGRADES) == set(range(1, FORMAT_VERSION))


def test_an_older_format_is_brought_up_to_date(monkeypatch):
    def upgrade(metadata: Metadata) -> Metadata:
        return {**metadata, "format_version": 2, "named_later": len(metadata["arrays"])}

    monkeypatch.setattr("capjax.checkpoint.files.FORMAT_VERSION", 2)
    monkeypatch.setitem(UPGRADES, 1, upgrade)
    old = epath.Path(FIXTURES / "checkpoint_format_1" / f"{STEP:08d}")
    assert read_metadata(old)["named_later"] == 9
    assert load_params(FIXTURES / "checkpoint_format_1").metadata["format_version"] == 2


if __name__ == "__main__":
    write(sys.argv[1])
