"""One writer, one configuration, whole files: checked against real processes that are killed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import jax
import pytest

from capjax.errors import UserError
from capjax.training.workdir import config_changes, open_workdir, require_free_space, write_atomic

CONFIG = {"seed": 0, "log_every_steps": 10, "optimizer": {"learning_rate": 1e-3}, "styles": ("a",)}

# Takes the lock, starts a forked child that outlives it (as a data worker may), says so, and waits.
HOLDER = """
import os, sys, time
from capjax.training.workdir import open_workdir
open_workdir(sys.argv[1], {"seed": 0})
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(100)
"""


def test_new_workdir_holds_its_sorted_config(workdir):
    with open_workdir(workdir, CONFIG) as opened:
        assert opened.is_new and opened.changes == ()
        text = (workdir / "config.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(CONFIG))
    assert list(json.loads(text)) == sorted(CONFIG)
    assert {p.name for p in workdir.iterdir()} == {".lock", "config.json"}


def test_same_config_resumes(workdir):
    open_workdir(workdir, CONFIG).close()
    with open_workdir(str(workdir), CONFIG) as opened:  # a tuple and the list it became are equal
        assert not opened.is_new and opened.changes == ()


def test_allowed_fields_change_and_are_written(workdir):
    open_workdir(workdir, CONFIG | {"evaluate": {}}).close()
    new = CONFIG | {"log_every_steps": 5, "evaluate": {"every_steps": 7, "deep": {"x": 1}}}
    with open_workdir(workdir, new, may_change=("log_every_steps", "evaluate.*")) as opened:
        assert not opened.is_new
        assert opened.changes == (
            "evaluate.deep.x: absent -> 1",
            "evaluate.every_steps: absent -> 7",
            "log_every_steps: 10 -> 5",
        )
    assert json.loads((workdir / "config.json").read_text())["log_every_steps"] == 5


def test_other_fields_are_refused_with_the_difference(workdir):
    open_workdir(workdir, CONFIG).close()
    before = (workdir / "config.json").read_bytes()
    new = CONFIG | {"log_every_steps": 5, "optimizer": {"learning_rate": 2e-3}}
    for _ in range(2):  # the refusal lets go of the lock
        with pytest.raises(UserError) as error:
            open_workdir(workdir, new, may_change=("log_*",))
        assert "(optimizer.learning_rate: 0.001 -> 0.002)" in str(error.value)
        assert "same configuration, or choose another --workdir" in str(error.value)
        assert "\n" not in str(error.value)
    assert (workdir / "config.json").read_bytes() == before


def test_a_field_that_is_newer_than_the_run_may_have_its_default(workdir):
    open_workdir(workdir, CONFIG).close()
    defaults = {"lora": {"rank": 0, "targets": ("a",)}, "seed": 0}
    new = CONFIG | {"lora": {"rank": 0, "targets": ("a",)}}
    with pytest.raises(UserError, match=r"lora.rank: absent -> 0"):
        open_workdir(workdir, new)
    with pytest.raises(UserError, match=r"lora.rank: absent -> 8"):
        open_workdir(workdir, new | {"lora": {"rank": 8, "targets": ("a",)}}, defaults=defaults)
    with open_workdir(workdir, new, defaults=defaults) as opened:
        assert len(opened.changes) == 2
    assert json.loads((workdir / "config.json").read_text())["lora"]["rank"] == 0


def test_config_changes_between_numbers_groups_and_absent_fields():
    old = {"a": 1, "b": {"c": 1, "d": [1, 2]}, "e": None, "f": {}}
    new = {"a": 1.0, "b": {"c": 2, "d": (1, 2)}, "g": {"h": "x"}}
    assert config_changes(old, new) == {
        "b.c": "1 -> 2",
        "e": "null -> absent",
        "g.h": 'absent -> "x"',
    }


def test_errors_leave_no_workdir_behind(tmp_path, monkeypatch):
    with pytest.raises(TypeError):
        open_workdir(tmp_path / "run", {"seed": object()})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match="No space left"):
        open_workdir(tmp_path / "run", CONFIG)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    open_workdir(tmp_path / "run", CONFIG).close()


def test_paths_that_cannot_be_a_workdir(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        open_workdir(tmp_path / "file", CONFIG)
    with pytest.raises(UserError, match="choose another"):
        open_workdir(tmp_path / "file" / "below", CONFIG)
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds checkpoints but no config\.json"):
        open_workdir(tmp_path / "old", CONFIG)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"seed"')
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        open_workdir(tmp_path / "torn", CONFIG)


def test_second_process_is_refused_until_the_first_is_killed(workdir):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(workdir)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with pytest.raises(UserError, match=rf"written by process {holder.pid} on \S+; wait"):
            open_workdir(workdir, {"seed": 0})
        assert json.loads((workdir / "config.json").read_text()) == {"seed": 0}
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)  # still there, sharing the killed process's open files
        opened = open_workdir(workdir, {"seed": 0})
        assert not opened.is_new
        os.kill(child, signal.SIGKILL)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with pytest.raises(UserError, match=f"process {os.getpid()} "):
        open_workdir(workdir, {"seed": 0})
    opened.close()
    opened.close()  # twice does nothing
    open_workdir(workdir, {"seed": 0}).close()


def test_processes_but_the_first_neither_lock_nor_write(workdir, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert open_workdir(workdir, CONFIG).lock is None
    assert not workdir.exists()


def test_write_atomic_replaces_whole_files(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with path.open() as reader:
        write_atomic(str(path), b"new")
        assert reader.read() == "old"  # another file by now: nobody ever sees a part
    assert path.read_bytes() == b"new"
    failure = OSError(errno.ENOSPC, "no room")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(failure))
    with pytest.raises(OSError, match="no room"):
        write_atomic(path, "half")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_free_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 0, 3 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    require_free_space(tmp_path / "not" / "there", 3 * 10**9)
    with pytest.raises(UserError, match=r"4\.00 GB needed on disk, 3\.00 GB free"):
        require_free_space(tmp_path / "not" / "there", 4 * 10**9)
    require_free_space("gs://bucket/run", 10**18)  # a store has no disk to fill


def test_changes_that_do_not_count_are_allowed_and_written(workdir):
    """`what_counts` of a value may be less than the value."""
    open_workdir(workdir, {"source": "a?cache=1", "b": 1}).close()

    def before_the_mark(value):
        return value.partition("?")[0] if isinstance(value, str) else value

    again = open_workdir(workdir, {"source": "a?cache=2", "b": 1}, (), before_the_mark)
    assert again.changes == ('source: "a?cache=1" -> "a?cache=2"',)
    again.close()
    with pytest.raises(UserError, match=r'source: "a\?cache=2" -> "c"'):
        open_workdir(workdir, {"source": "c", "b": 1}, (), before_the_mark)
