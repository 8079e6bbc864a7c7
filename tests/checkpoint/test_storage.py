"""Storage that fails at any call: a save is good or reported, a restore is right or an error."""

import contextlib
import errno
import random
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from capjax.checkpoint import Checkpointer, RunInfo, find_steps, load_params
from capjax.checkpoint.directory import list_steps, step_directory
from capjax.checkpoint.files import METADATA_FILE, checked_metadata, read_metadata
from capjax.errors import StorageError, UserError
from tests.checkpoint.faulty import Faulty, install, quick

RUN = RunInfo(tokenizer_model=b"tokens")
# Orbax and TensorStore go on to tell event loops that are closed of the errors made here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state_of(step: int) -> dict:
    w = jnp.arange(64, dtype=jnp.float32).reshape(8, 8) * step
    return {"params": {"w": w}, "step": jnp.int32(step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints of steps 10 and 20."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpointer(directory, RUN) as ours:
        for step in (10, 20):
            ours.save(step, state_of(step), {"examples_seen": step})
    return directory


@pytest.fixture(params=["local", "remote"])
def kind(request, monkeypatch) -> str:
    """Remote: as on gs://, saved in place, a checkpoint once it has its metadata."""
    if request.param == "remote":
        for module in ("checkpoint.directory", "training.workdir", "training.storage"):
            monkeypatch.setattr(f"capjax.{module}.is_remote", lambda path: True)
    return request.param


class Copies:
    """Stands for Orbax: what it would write of step 20 is copied from where it once did."""

    def __init__(self, saved: Path):
        self._saved = saved

    def save(self, target, args):
        shutil.copytree(self._saved / "00000020" / "state", target)

    def wait_until_finished(self):
        pass

    def close(self):
        pass


@contextlib.contextmanager
def failing(monkeypatch, faulty: Faulty):
    with monkeypatch.context() as patch:
        install(patch, faulty)
        yield


@pytest.fixture(autouse=True)
def no_commit(monkeypatch):
    """Asking git at every opening takes most of the time here."""
    monkeypatch.setattr("capjax.checkpoint.metadata._git_commit", lambda: None)


def save_20(directory: Path, saved: Path) -> list[str]:
    """Saves step 20 over step 10, however it goes; what was reported, a failed save last."""
    said = []
    try:
        ours = Checkpointer(directory, RUN, report=said.append)
    except UserError as error:
        return [f"not opened: {error}"]
    ours._orbax.close()
    ours._orbax = Copies(saved)
    ours.save(20, state_of(20), {"examples_seen": 20})
    try:
        ours.close()
    except UserError as error:
        said.append(f"not saved: {error}")
    return said


def check(directory: Path, said: list[str]) -> None:
    """All that counts there is whole; step 20 is there unless it was reported."""
    place = epath.Path(directory)
    steps = list_steps(place)
    failed = [line for line in said if line.startswith("not ")]
    assert 10 in steps and set(steps) <= {10, 20}
    assert 20 in steps or failed, said
    for step in steps:
        assert checked_metadata(step_directory(place, step))["step"] == step


@pytest.mark.parametrize("how", ["before", "after", "half"])
def test_one_failure_at_any_call_of_a_save_is_outlived(
    how, kind, saved, tmp_path, monkeypatch, capsys
):
    """Of our own calls; Orbax's are failed below."""
    quick(monkeypatch)
    n, good, failed = 0, 0, 1
    while failed:
        directory = tmp_path / f"{n}" / "checkpoints"
        shutil.copytree(saved / "00000010", directory / "00000010")
        faulty = Faulty(lambda k, name, n=n: how if k == n else "")
        with failing(monkeypatch, faulty):
            said = save_20(directory, saved)
        failed = faulty.failed
        check(directory, said)
        good += not any(line.startswith("not ") for line in said)
        n += 1
    assert n > 15
    assert good == n, "what may pass was not tried again"
    assert "trying again in" in capsys.readouterr().err


def test_storage_that_stays_away_fails_the_save_and_keeps_the_other(
    kind, saved, tmp_path, monkeypatch, capsys
):
    quick(monkeypatch)
    reported = []
    for n in range(0, 40, 3):
        directory = tmp_path / f"{n}" / "checkpoints"
        shutil.copytree(saved / "00000010", directory / "00000010")
        with failing(monkeypatch, Faulty(lambda k, name, n=n: "before" if k >= n else "")):
            said = save_20(directory, saved)
        check(directory, said)
        reported += [line for line in said if line.startswith("not ")]
    assert len(reported) > 4
    assert all("failed for 60 s (Input/output error)" in line for line in reported)


def restored(directory: Path) -> tuple[int, list[str]]:
    said = []
    with Checkpointer(directory, RUN, report=said.append) as ours:
        step, state, extra = ours.restore_latest(state_of(1))
    assert extra == {"examples_seen": step}
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state, state_of(step))
    assert all(jax.tree.leaves(same))
    return step, said


def test_one_failure_at_any_call_of_a_restore_is_outlived(
    kind, saved, tmp_path, monkeypatch, capsys
):
    """Never the older one, never a good one set aside, whichever call fails, Orbax's included."""
    quick(monkeypatch)
    directory = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    n, failed = 0, 1
    while failed:
        faulty = Faulty(lambda k, name, n=n: "before" if k == n else "")
        with failing(monkeypatch, faulty):
            step, said = restored(directory)
        failed = faulty.failed
        assert step == 20, (n, said)
        assert not any("damaged" in line for line in said)
        n += 1
    assert n > 20
    assert sorted(path.name for path in directory.iterdir()) == ["00000010", "00000020"]


def test_storage_that_stays_away_is_neither_damage_nor_absence(
    kind, saved, tmp_path, monkeypatch, capsys
):
    quick(monkeypatch)
    directory = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    for n in (0, 1, 3, 6, 10, 15, 20):
        with failing(monkeypatch, Faulty(lambda k, name, n=n: "before" if k >= n else "")):
            with pytest.raises(StorageError, match="run the same command again"):
                restored(directory)
            with pytest.raises(StorageError, match="run the same command again"):
                load_params(directory)
            with pytest.raises(StorageError):
                find_steps(directory)
        assert sorted(path.name for path in directory.iterdir()) == ["00000010", "00000020"]
    assert restored(directory) == (20, [])


def test_random_failures_of_all_calls(saved, tmp_path, monkeypatch, capsys):
    """Orbax's too, in saves and restores: one call in thirty."""
    quick(monkeypatch)
    rng = random.Random(0)
    directory = tmp_path / "checkpoints"
    kept, num_failed, num_saved = 0, 0, 0
    for step in range(10, 90, 10):
        said = []
        faulty = Faulty(lambda k, name: "before" if rng.random() < 1 / 30 else "")
        with failing(monkeypatch, faulty):
            ours = Checkpointer(directory, RUN, report=said.append)
            ours.save(step, state_of(step), {"examples_seen": step})
            try:
                ours.close()
                kept, num_saved = step, num_saved + 1
            except UserError as error:
                assert f"step {step} could not be saved" in str(error)
        num_failed += faulty.failed
        if kept:
            assert restored(directory)[0] in (kept, step)
    assert num_failed > 8 and num_saved > 2


def test_what_may_not_be_read_is_not_damage(saved, tmp_path, monkeypatch):
    """By TensorStore as by us."""
    directory = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    denied = ValueError("PERMISSION_DENIED: Error opening [OS error 13: EACCES Permission denied]")

    def deny(*args, **kwargs):
        raise denied

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", deny)
        with pytest.raises(UserError, match=r"cannot read .*00000020/state: permission denied"):
            restored(directory)
    assert restored(directory) == (20, [])


def test_a_lost_answer_to_a_rename_loses_nothing(saved, tmp_path, monkeypatch, capsys):
    """Of a step saved again: the second try must not take the new one for the old."""
    quick(monkeypatch)
    directory = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    created = read_metadata(epath.Path(directory / "00000020"))
    with failing(monkeypatch, Faulty(lambda k, name: "after" if name == "rename" else "")):
        said = save_20(directory, saved)
    assert [line for line in said if line.startswith("not ")] == []
    assert read_metadata(epath.Path(directory / "00000020"))["extra"] == created["extra"]
    assert (directory / "00000020" / METADATA_FILE).stat().st_mtime > (
        saved / "00000020" / METADATA_FILE
    ).stat().st_mtime


def save(ours: Checkpointer, step: int) -> None:
    """Saves a step as a run does, which hears of a failure at the next save."""
    ours.save(step, state_of(step), {"examples_seen": step})
    ours._thread and ours._thread.join()


def test_a_disk_that_is_read_only_for_a_while(small_disk, caplog):
    """The run goes on through two failed saves, and the third is good."""

    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(small_disk)], check=True)

    said = []
    directory = small_disk / "checkpoints"
    with Checkpointer(directory, RUN, report=said.append) as ours:
        save(ours, 10)
        remount("ro")
        for step in (20, 30):
            save(ours, step)
            assert list_steps(directory) == [10]
        remount("rw")
        save(ours, 40)
    assert [re.search(r"\((.*)\), (failure .*)", line)[0] for line in said] == [
        f"(Read-only file system), failure {n} of 3 in a row; step 10 is kept" for n in (1, 2)
    ]
    assert list_steps(directory) == [10, 40]
    assert restored(Path(directory)) == (40, [])


def test_what_the_writing_of_arrays_meets(saved, tmp_path, monkeypatch):
    """Errors of Orbax's own thread: counted, not tried again, as the state is gone by then."""
    directory = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    errors = [OSError(errno.EIO, "Input/output error"), TimeoutError("no answer"), ValueError("x")]
    said, last = [], r"step 50 .*\(ValueError: x\), failure 3 of 3 in a row; step 20 is kept"
    ours = Checkpointer(directory, RUN, report=said.append)
    with pytest.raises(UserError, match=last), ours:
        wait = ours._orbax.wait_until_finished
        for step, error in zip((30, 40, 50), errors, strict=True):

            def fail(error=error):
                wait()
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(ours._orbax, "wait_until_finished", fail)
                save(ours, step)
    assert [line.partition("(")[2].partition(")")[0] for line in said] == [
        "Input/output error",
        "TimeoutError: no answer",
    ]
    assert restored(directory) == (20, [])


def test_a_directory_that_vanishes(tmp_path, monkeypatch):
    """Between saves it is made anew; under a save, that save has failed."""
    directory, said = tmp_path / "checkpoints", []
    with Checkpointer(directory, RUN, report=said.append) as ours:
        save(ours, 10)
        shutil.rmtree(directory)
        save(ours, 20)
        wait = ours._orbax.wait_until_finished
        with monkeypatch.context() as patch:
            vanish = lambda: wait() or shutil.rmtree(directory / "00000030.partial")  # noqa: E731
            patch.setattr(ours._orbax, "wait_until_finished", vanish)
            save(ours, 30)
        save(ours, 40)
    assert len(said) == 1 and "step 30 could not be saved" in said[0]
    assert "failure 1 of 3 in a row; step 20 is kept" in said[0]
    assert list_steps(epath.Path(directory)) == [20, 40]
    assert restored(directory) == (40, [])
