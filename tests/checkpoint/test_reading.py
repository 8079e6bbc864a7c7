"""A finished checkpoint serves its model alone, with capjax and without."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from capjax.checkpoint import load_params
from capjax.errors import UserError

README = Path(__file__).parents[2] / "README.md"
PRINT = """
import sys
for path, x in jax.tree.leaves_with_path(params):
    print(jax.tree_util.keystr(path), x.dtype, x.shape, x.tobytes().hex())
assert not any(name.startswith("capjax") for name in sys.modules)
"""


@pytest.fixture
def saved(open_checkpointer, state_of, mesh_of, workdir):
    """A checkpoint of step 700 from a mesh of eight devices, and its state."""
    state = state_of(1, mesh_of(2, 4))
    ours = open_checkpointer(workdir / "checkpoints")
    ours.save(600, state_of(2), {"examples_seen": 0})
    ours.save(700, state, {"examples_seen": 0})
    ours.wait()
    return state


def test_load_params(saved, workdir, bits_of, run_info, monkeypatch):
    for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "00000700"):
        loaded = load_params(path)
        assert loaded.step == 700
        assert bits_of(loaded.params) == bits_of(saved.params)
        for x in jax.tree.leaves(loaded.params):
            assert x.devices() == set(jax.devices()[:1])
        assert loaded.tokenizer_model == run_info.tokenizer_model
        assert loaded.metadata["config"] == run_info.config
    assert load_params(workdir / "checkpoints" / "00000600").step == 600
    monkeypatch.chdir(workdir)
    assert load_params("checkpoints").step == 700


def test_load_params_within_a_mesh(saved, workdir, mesh_of, bits_of):
    with jax.set_mesh(mesh_of(4, 2)):
        assert bits_of(load_params(workdir).params) == bits_of(saved.params)


def test_load_params_reads_no_optimizer(saved, workdir, monkeypatch):
    from capjax.checkpoint import reading

    asked = []
    real = reading.read_arrays
    monkeypatch.setattr(
        reading, "read_arrays", lambda path, wanted: asked.extend(wanted) or real(path, wanted)
    )
    load_params(workdir)
    assert sorted(asked) == [
        "params/decoder/embedding",
        "params/encoder/bias",
        "params/encoder/kernel",
    ]


def test_nothing_there(workdir):
    with pytest.raises(
        UserError, match=r"no checkpoint in .* \(there is no such directory\); expe"
    ):
        load_params(workdir)
    workdir.mkdir()
    with pytest.raises(UserError, match=r"no checkpoint in .*/run; expected a workdir"):
        load_params(str(workdir))


def test_plain_jax_reads_the_parameters(saved, workdir, tmp_path):
    """On another number of devices, warnings being errors, and without capjax."""
    (tmp_path / "runs").mkdir()
    workdir.rename(tmp_path / "runs" / "quickstart")
    (snippet,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
        if "orbax.checkpoint" in block
    )
    assert sum(bool(line) for line in snippet.splitlines()) == 5
    snippet = re.sub(r"checkpoints/\d+", "checkpoints/00000700", snippet)
    command = [sys.executable, "-W", "error", "-c", snippet + PRINT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape} {np.asarray(x).tobytes().hex()}"
        for path, x in jax.tree.leaves_with_path(saved.params)
    ]
