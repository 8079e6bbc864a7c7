"""A run that goes on upon another mesh goes on with the same losses.

`python -m tests.checkpoint.test_other_mesh` takes 100 steps and prints the largest difference.
"""

import itertools
import tempfile

import jax
import numpy as np

from capjax.checkpoint import Checkpointer, RunInfo
from capjax.checkpoint.digest import params_digest
from capjax.commands.program import Program, build_mesh, build_program
from capjax.commands.settings import load_config
from capjax.data.pipeline import synthetic_batches
from capjax.mesh import place_batch

SAVED_AT = 2
EIGHT = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
OTHERS = (("mesh.data=1",), ("mesh.data=1", "mesh.fsdp=4"))


def program(mesh: tuple[str, ...]) -> Program:
    """A captioner of the quickstart's kind, in float32."""
    small = ("width=32", "depth=1", "decoder_depth=1", "num_heads=2", "mlp_dim=64", "patch_size=8")
    overrides = [f"model.{field}" for field in small]
    overrides += ["batch_size=8", "preprocessing.image_size=16", "data.text_length=8"]
    config = load_config("emoji_quickstart", [*overrides, "model.dtype=float32", *mesh])
    sizes = [int(text.partition("=")[2]) for text in mesh]
    devices = jax.devices()[: int(np.prod(sizes))]
    return build_program(config, build_mesh(config, devices), vocab_size=64)


def losses_from(made: Program, state, start: int, steps: int) -> tuple[object, list[float]]:
    """The state after some steps, and their losses."""
    config = made.config
    rows = synthetic_batches(
        image_size=config.preprocessing.image_size,
        text_length=config.data.text_length,
        vocab_size=64,
        batch_size=config.batch_size,
        seed=0,
    )
    losses = []
    for batch in itertools.islice(rows, start, start + steps):
        state, metrics = made.train_step(state, place_batch(made.mesh, batch))
        losses.append(float(metrics["loss"]))
    return state, losses


def differences(directory, steps: int) -> list[float]:
    """The largest relative difference of the losses, upon each of the other meshes."""
    made = program(EIGHT)
    with jax.set_mesh(made.mesh), Checkpointer(directory, RunInfo()) as checkpointer:
        state, _ = losses_from(made, jax.jit(made.init_state)(), 0, SAVED_AT)
        digest = params_digest(state.params)
        checkpointer.save(SAVED_AT, state, {"examples_seen": 0})
        _, expected = losses_from(made, state, SAVED_AT, steps)
    assert len(set(expected)) == steps
    found = []
    for mesh in OTHERS:
        made = program(mesh)
        with jax.set_mesh(made.mesh), Checkpointer(directory, RunInfo()) as checkpointer:
            _, state, _ = checkpointer.restore_latest(made.abstract_inputs()[0])
            assert params_digest(state.params) == digest
            _, losses = losses_from(made, state, SAVED_AT, steps)
        found.append(float(np.max(np.abs(np.divide(losses, expected) - 1))))
    return found


def test_losses_go_on_the_same(tmp_path):
    assert max(differences(tmp_path, 4)) < 1e-5


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    with tempfile.TemporaryDirectory() as directory:
        for mesh, difference in zip(OTHERS, differences(directory, 100), strict=True):
            print(f"{' '.join(EIGHT)} -> {' '.join(mesh)}: {difference:.2g}")
