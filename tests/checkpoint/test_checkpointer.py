"""What is saved comes back bit for bit, on any mesh, whatever befalls the save."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from capjax.checkpoint import Keep, check_disk_space, checkpointer, load_params, verify
from capjax.checkpoint.directory import list_steps, partial_directory, step_directory
from capjax.checkpoint.files import METADATA_FILE, checked_metadata
from capjax.errors import UserError


def place(tmp_path) -> epath.Path:
    return epath.Path(tmp_path / "checkpoints")


def steps(tmp_path) -> list[int]:
    return list_steps(place(tmp_path))


def names(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("saved", [(2, 2, 2), None], ids=["saved on 8", "saved on 1"])
def test_restores_bit_for_bit_onto_any_mesh(
    saved, mesh_of, state_of, abstract, bits_of, open_checkpointer
):
    """(fsdp, tensor, data): on 1, 2, 4 and 8 devices, and without a mesh."""
    state = state_of(1, mesh_of(*saved) if saved else None)
    ours = open_checkpointer()
    ours.save(10, state, {"examples_seen": 640, "note": [1.5, None, "é"]})
    ours.wait()
    for shape in ((2, 4), (1, 8), (8, 1), (2, 1, 2), (2, 2), (1, 2), (1, 1), None):
        other = state_of(2, mesh_of(*shape) if shape else None)
        assert bits_of(other) != bits_of(state)
        step, restored, extra = open_checkpointer().restore_latest(abstract(other))
        assert (step, extra) == (10, {"examples_seen": 640, "note": [1.5, None, "é"]})
        assert bits_of(restored) == bits_of(state)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert [x.sharding for x in jax.tree.leaves(restored)] == [
            x.sharding for x in jax.tree.leaves(other)
        ]
        if shape:  # the state is one that a step can use: its types fit the mesh that is set
            with jax.set_mesh(mesh_of(*shape)):
                jax.block_until_ready(jax.jit(lambda s: s.params["encoder"]["bias"] + 1)(restored))


def test_restores_into_the_result_of_eval_shape(mesh_of, state_of, bits_of, open_checkpointer):
    mesh = mesh_of(4, 2)
    state = state_of(1, mesh)
    ours = open_checkpointer()
    ours.save(10, state, {"examples_seen": 0})
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: jax.tree.map(lambda x: x, state))
        _, restored, _ = ours.restore_latest(abstract)
    assert bits_of(restored) == bits_of(state)
    assert restored.params["encoder"]["kernel"].sharding == NamedSharding(mesh, P("fsdp", "tensor"))


def test_metadata_is_complete(tmp_path, mesh_of, state_of, run_info, open_checkpointer):
    ours = open_checkpointer()
    ours.save(10, state_of(1, mesh_of(2, 4)), {"examples_seen": 640})
    ours.wait()
    directory = step_directory(place(tmp_path), 10)
    metadata = checked_metadata(directory)
    assert metadata["format_version"] == 1
    assert (metadata["step"], metadata["examples_seen"]) == (10, 640)
    assert metadata["config"] == run_info.config
    assert metadata["preprocessing"] == run_info.preprocessing
    assert metadata["pixels_by"] == run_info.pixels_by
    assert metadata["data"] == run_info.data
    if (Path(__file__).parents[2] / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", metadata["git_commit"])
    assert all(re.fullmatch("[0-9a-f]{16}", x["digest"]) for x in metadata["arrays"].values())
    assert metadata["mesh"] == {"replica": 1, "data": 1, "fsdp": 2, "tensor": 4}
    assert metadata["versions"]["jax"] == jax.__version__
    assert {"capjax", "flax", "orbax-checkpoint", "python"} < metadata["versions"].keys()
    paths = [path for path in Path(directory).rglob("*") if path.is_file()]
    on_disk = {str(path.relative_to(directory)) for path in paths}
    assert on_disk == metadata["files"].keys() | {METADATA_FILE}
    assert metadata["arrays"]["params/decoder/embedding"] | {"digest": ""} == {
        "shape": [16, 8],
        "dtype": "bfloat16",
        "digest": "",
    }
    assert metadata["arrays"]["key_data"]["key_impl"] == "threefry2x32"
    assert (directory / "tokenizer.model").read_bytes() == run_info.tokenizer_model


def test_save_returns_before_the_checkpoint_is_there(
    tmp_path, monkeypatch, state_of, open_checkpointer
):
    go_on = threading.Event()
    real = checkpointer.files.file_entries
    monkeypatch.setattr(
        checkpointer.files, "file_entries", lambda path: go_on.wait(60) and real(path)
    )
    ours = open_checkpointer()
    ours.save(10, state_of(1), {"examples_seen": 0})
    assert steps(tmp_path) == []
    go_on.set()
    ours.wait()
    assert steps(tmp_path) == [10]
    assert names(tmp_path) == ["00000010"]


def test_buffers_may_be_donated_at_once(mesh_of, state_of, abstract, bits_of, open_checkpointer):
    """The next steps overwrite the state's memory while it is still being written."""
    state = state_of(1, mesh_of(2, 4), large=2**16)
    saved, target = bits_of(state), abstract(state)
    ours = open_checkpointer()
    scramble = jax.jit(
        lambda s: jax.tree.map(lambda x: x if _is_key(x) else jnp.zeros_like(x), s),
        donate_argnums=0,
    )
    scramble(state_of(2, mesh_of(2, 4), large=2**16))  # compiled before the race
    ours.save(10, state, {"examples_seen": 0})
    state = jax.block_until_ready(scramble(state))
    _, restored, _ = ours.restore_latest(target)
    assert bits_of(restored) == saved


def _is_key(x) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def test_works_under_the_loop_s_transfer_guard(state_of, abstract, open_checkpointer):
    state = state_of(1)
    ours = open_checkpointer()
    with jax.transfer_guard("disallow"):
        ours.save(10, state, {"examples_seen": 0})
        ours.wait()
        assert ours.restore_latest(abstract(state))[0] == 10


def test_a_step_can_be_saved_again(tmp_path, state_of, abstract, bits_of, open_checkpointer):
    ours = open_checkpointer()
    for seed in (1, 2):
        ours.save(10, state_of(seed), {"examples_seen": seed})
    _, restored, extra = ours.restore_latest(abstract(state_of(1)))
    assert bits_of(restored) == bits_of(state_of(2))
    assert extra == {"examples_seen": 2}
    assert names(tmp_path) == ["00000010"]


def test_leftovers_of_a_killed_save(tmp_path, state_of, open_checkpointer):
    ours = open_checkpointer()
    for step in (10, 20, 30):
        ours.save(step, state_of(1), {"examples_seen": 0})
    ours.close()
    directory = tmp_path / "checkpoints"
    (directory / "00000030").rename(directory / "00000030.partial")  # only the name was missing
    (directory / "00000020").rename(directory / "00000020.partial")
    (directory / "00000020.partial" / METADATA_FILE).unlink()  # half written
    (directory / "00000005.removed").mkdir()  # half deleted
    (directory / "00000007.damaged").mkdir()  # set aside for the user to look at
    open_checkpointer()
    assert names(tmp_path) == ["00000007.damaged", "00000010", "00000030"]


def test_nothing_there(open_checkpointer, state_of, abstract):
    assert open_checkpointer().restore_latest(abstract(state_of(1))) is None


def test_another_structure_is_named_and_is_not_damage(
    tmp_path, state_of, abstract, open_checkpointer
):
    ours = open_checkpointer()
    ours.save(10, state_of(1), {"examples_seen": 0})
    fitting = abstract(state_of(1))
    wide = fitting._replace(
        params={
            "encoder": {
                "kernel": jax.ShapeDtypeStruct((8, 32), jnp.float32),
                "bias": jax.ShapeDtypeStruct((8,), jnp.bfloat16),
            },
            "head": jax.ShapeDtypeStruct((), jnp.float32),
        }
    )
    with pytest.raises(UserError) as error:
        ours.restore_latest(wide)
    for part in (
        "params/decoder/embedding only in the checkpoint",
        "params/encoder/bias is float32[8] in the checkpoint and bfloat16[8] in this run",
        "params/encoder/kernel is float32[8,16] in the checkpoint and float32[8,32] in this run",
        "params/head only in this run",
    ):
        assert part in str(error.value)
    other_key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl="rbg"), 8))
    with pytest.raises(UserError, match=r"key_data is uint32\[8,2\] of key<fry>.*of key<rbg>"):
        ours.restore_latest(fitting._replace(key=other_key))
    assert steps(tmp_path) == [10]
    assert ours.restore_latest(fitting)[0] == 10


def test_another_format_version_is_an_error(tmp_path, state_of, abstract, open_checkpointer):
    ours = open_checkpointer()
    for step in (10, 20):
        ours.save(step, state_of(1), {"examples_seen": 0})
    ours.wait()
    directory = step_directory(place(tmp_path), 20)
    metadata = checked_metadata(directory)
    checkpointer.files.write_metadata(
        directory, {**metadata, "format_version": 9, "versions": {"capjax": "7.0"}}
    )
    with pytest.raises(UserError, match=r"format 9, but this capjax reads formats up to 1;.*7\.0"):
        ours.restore_latest(abstract(state_of(1)))
    assert steps(tmp_path) == [10, 20]


def test_extra_is_checked_when_it_is_given(state_of, open_checkpointer):
    ours = open_checkpointer()
    with pytest.raises(ValueError, match="examples_seen"):
        ours.save(10, state_of(1), {})
    with pytest.raises(TypeError, match="serializable"):
        ours.save(10, state_of(1), {"examples_seen": np.int32(3)})


def test_failed_saves_are_counted_and_earlier_ones_stay(
    tmp_path, monkeypatch, state_of, abstract, bits_of, open_checkpointer
):
    """Once in Orbax's writing and once in ours, which is where a full disk can strike."""
    ours = open_checkpointer(max_failures=2)
    state = state_of(1)
    ours.save(10, state, {"examples_seen": 0})
    ours.wait()
    full = OSError(28, "No space left on device")

    def fail(*args, **kwargs):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(ours._orbax, "save", fail)
        ours.save(20, state, {"examples_seen": 0})
    ours.save(30, state, {"examples_seen": 0})  # works again: the count starts anew
    assert len(ours.reports) == 1
    assert "step 20 could not be saved" in ours.reports[0]
    assert "no space left on the disk), failure 1 of 2 in a row; step 10 is kept" in ours.reports[0]
    ours.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpointer.files, "write_metadata", fail)
        ours.save(40, state, {"examples_seen": 0})
        with pytest.raises(UserError, match=r"step 40 could not be saved.*step 30 is kept"):
            ours.wait()
        ours.save(50, state, {"examples_seen": 0})
        with pytest.raises(UserError, match=r"step 50 .*failure 2 of 2 in a row.*run the same"):
            ours.save(60, state, {"examples_seen": 0})
    assert names(tmp_path) == ["00000010", "00000030"]
    assert ours.restore_latest(abstract(state))[0] == 30


def test_a_full_disk_is_foreseen(small_disk, caplog, state_of, abstract, open_checkpointer):
    state = state_of(1, large=2**15)  # 1.5 MiB with its moments
    ours = open_checkpointer(small_disk)
    for step in (10, 20):
        ours.save(step, state, {"examples_seen": 0})
        ours.wait()
    ours.save(30, state, {"examples_seen": 0})
    with pytest.raises(UserError, match=r"step 30 .* MB needed on disk, .* step 20 is kept"):
        ours.wait()
    assert sorted(path.name for path in small_disk.iterdir()) == ["00000010", "00000020"]
    assert verify(small_disk, 20) == []
    with pytest.raises(UserError, match="needed on disk"):
        check_disk_space(small_disk, abstract(state), kept=5)
    check_disk_space(small_disk, abstract(state_of(1)), kept=5)
    shutil.rmtree(small_disk / "00000010")
    ours.save(40, state, {"examples_seen": 0})
    ours.wait()
    assert list_steps(small_disk) == [20, 40]
    assert caplog.records == []


# In a process of its own, as TensorStore goes on to tell a closed event loop of its errors.
FILLER = """
import shutil, sys
import jax.numpy as jnp
from capjax.checkpoint import Checkpointer, RunInfo, checkpointer
from capjax.errors import UserError
checkpointer.require_free_space = lambda *args: None
state = {"params": {"a": jnp.ones((1000, 250)), "b": jnp.ones((1000, 250))}, "step": jnp.int32(0)}
ours = Checkpointer(sys.argv[1], RunInfo())
for step in (10, 20, 30):
    ours.save(step, state, {"examples_seen": 0})
    try:
        ours.wait()
    except UserError as error:
        print(error)
shutil.rmtree(sys.argv[1] + "/00000010")
ours.save(40, state, {"examples_seen": 0})
ours.close()
"""


def test_a_full_disk_that_only_the_write_meets(small_disk):
    """As under a quota. The earlier checkpoints stay good, and later ones can be written."""
    done = subprocess.run(
        [sys.executable, "-c", FILLER, str(small_disk)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "step 30 could not be saved" in line
    assert "(no space left on the disk), failure 1 of 3 in a row; step 20 is kept" in line
    assert sorted(path.name for path in small_disk.iterdir()) == ["00000020", "00000040"]
    assert verify(small_disk, 20) == verify(small_disk, 40) == []


def test_a_directory_that_cannot_be_made(tmp_path, open_checkpointer):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*Not a directory"):
        open_checkpointer(tmp_path / "file" / "checkpoints")


def test_an_error_under_way_is_not_hidden_by_a_failed_save(
    monkeypatch, state_of, open_checkpointer
):
    def fail(*args):
        raise OSError("the disk is gone")

    ours = open_checkpointer()
    monkeypatch.setattr(checkpointer.files, "write_metadata", fail)
    with pytest.raises(ZeroDivisionError), ours:
        ours.save(10, state_of(1), {"examples_seen": 0})
        raise ZeroDivisionError
    assert "step 10 could not be saved" in ours.reports[0]
    with pytest.raises(UserError, match="the disk is gone"), open_checkpointer() as other:
        other.save(10, state_of(1), {"examples_seen": 0})


def test_a_store_without_renames(
    tmp_path, monkeypatch, state_of, abstract, bits_of, open_checkpointer
):
    """As on gs://: written in place, and a checkpoint only with its metadata."""
    monkeypatch.setattr("capjax.checkpoint.directory.is_remote", lambda path: True)
    ours = open_checkpointer(keep=Keep(2))
    for seed in (1, 2, 3):
        ours.save(10 * seed, state_of(seed), {"examples_seen": 0})
    ours.wait()
    assert names(tmp_path) == ["00000020", "00000030"]
    directory = place(tmp_path)
    assert partial_directory(directory, 30) == directory / "00000030"
    (directory / "00000030" / METADATA_FILE).unlink()  # as a killed save leaves it
    assert steps(tmp_path) == [20]
    step, restored, _ = open_checkpointer().restore_latest(abstract(state_of(1)))
    assert (step, bits_of(restored)) == (20, bits_of(state_of(2)))
    ours.save(30, state_of(4), {"examples_seen": 0})
    assert bits_of(ours.restore_latest(abstract(state_of(1)))[1]) == bits_of(state_of(4))


# Saves as fast as it can a state that says which step it is of; names each save that is kept.
SAVER = """
import itertools, sys
import jax, jax.numpy as jnp
from capjax.checkpoint import Checkpointer, Keep, RunInfo
state = {"params": {"w": jnp.zeros((64, 64))}, "step": jnp.int32(0)}
with Checkpointer(sys.argv[1], RunInfo(), keep=Keep(2)) as checkpointer:
    restored = checkpointer.restore_latest(state)
    first = restored[0] + 1 if restored else 1
    for step in itertools.count(first):
        state = {"params": {"w": jnp.full((64, 64), step, jnp.float32)}, "step": jnp.int32(step)}
        checkpointer.save(step, state, {"examples_seen": step})
        print(step - 1, flush=True)
"""


def test_kill_9_leaves_the_last_good_one(tmp_path, open_checkpointer):
    rng = random.Random(0)
    directory = tmp_path / "checkpoints"
    target = {
        "params": {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)},
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    met_a_save = False
    for _ in range(3):
        command = [sys.executable, "-W", "error", "-c", SAVER, str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as saver:
            lines = [saver.stdout.readline() for _ in range(rng.randint(3, 6))]
            time.sleep(rng.uniform(0, 0.15))
            saver.kill()
            lines += saver.stdout.readlines()
        assert saver.returncode == -signal.SIGKILL
        kept = max(int(line) for line in lines if line.endswith("\n"))
        met_a_save |= any(path.suffix == ".partial" for path in directory.iterdir())
        ours = open_checkpointer(directory)
        step, state, extra = ours.restore_latest(target)
        assert ours.reports == []
        assert step >= kept > 0
        assert extra == {"examples_seen": step}
        np.testing.assert_array_equal(state["params"]["w"], np.full((64, 64), step))
        assert int(state["step"]) == step
        assert load_params(directory).step == step
        assert all(name.isdigit() for name in names(tmp_path))
    assert met_a_save, "no kill met a save; the test shows nothing"


def test_metadata_is_plain_json(tmp_path, state_of, open_checkpointer):
    ours = open_checkpointer()
    ours.save(10, state_of(1), {"examples_seen": 0})
    ours.wait()
    path = tmp_path / "checkpoints" / "00000010" / METADATA_FILE
    assert json.loads(path.read_text())["arrays"]["step"]["dtype"] == "int32"
