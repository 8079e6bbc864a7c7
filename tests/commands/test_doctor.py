"""`capjax doctor`: what it says of a good machine and of bad ones, and its exit status."""

import json
import types

import jax
import pytest
from etils import epath

from capjax import cli
from capjax.commands import doctor
from capjax.commands.doctor import Finding

CHECKS = "devices collectives clocks storage sharing versions compile cache decoding preemption"


@pytest.fixture
def started(monkeypatch):
    monkeypatch.setattr("capjax.commands.runtime.start", lambda *args, **kwargs: None)


def test_every_check_says_a_line_and_a_good_machine_has_status_0(started, tmp_path, capsys):
    status = cli.main(["doctor", f"--workdir={tmp_path}", f"--compile_cache={tmp_path / 'cache'}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("fix")] == [] and status == 0
    assert " ".join(line.split(":")[1].strip() for line in lines) == CHECKS
    assert all(line.split(":")[0] in ("ok", "warn") for line in lines)
    assert "sums over 8 devices of 1 process(es) are right" in lines[1]
    assert list(tmp_path.glob(".doctor*")) == []  # nothing is left
    assert "SIGTERM to one process stops the run before the same step" in lines[-1]


def test_what_must_be_mended_is_status_1(started, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: types.SimpleNamespace(total=9, used=9, free=10**8)
    )
    monkeypatch.setattr(doctor, "decoding", lambda: iter([][0]))  # a check that breaks
    assert cli.main(["doctor", f"--workdir={tmp_path}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("fix:")] == [
        f"fix:  storage: {tmp_path} has 0.10 GB free: make room for checkpoints",
        "fix:  decoding: IndexError: list index out of range",
    ]
    assert cli.main(["doctor", "--workdir=no/such/directory"]) == 2
    assert "there is no such directory" in capsys.readouterr().err


def test_storage_that_lies_or_refuses_is_to_be_mended(tmp_path, monkeypatch):
    path_type = type(epath.Path(tmp_path))
    read = path_type.read_bytes
    monkeypatch.setattr(path_type, "read_bytes", lambda path: read(path)[::-1])
    assert "other bytes than were written" in next(doctor.storage(str(tmp_path))).text

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(path_type, "read_bytes", refuse)
    (found,) = doctor.storage(str(tmp_path))
    assert (found.level, "Read-only file system" in found.text) == ("fix", True)
    assert list(tmp_path.iterdir()) == []


def test_sums_that_are_wrong_are_seen(monkeypatch):
    right = jax.numpy.sum
    monkeypatch.setattr(jax.numpy, "sum", lambda x, axis: right(x, axis=axis).at[7].add(1))
    (found,) = doctor.collectives()
    assert found == Finding("fix", "1 of 1048576 sums are wrong: test or replace this machine")


def test_packages_that_do_not_fit_are_named(monkeypatch):
    monkeypatch.setattr(
        "importlib.metadata.requires",
        lambda name: ["jax>=99", "numpy>=1", "no_such_package>=2", "torch; extra == 'x'"],
    )
    (found,) = doctor.versions()
    assert found.level == "fix"
    assert f"jax {jax.__version__}, needs >=99; no_such_package None, needs >=2" in found.text


def test_what_processes_find_is_told_once_with_their_numbers(monkeypatch):
    both, other = Finding("ok", "one clock"), Finding("fix", "no disk")
    theirs = [[both], [both, other], [both, other]]
    monkeypatch.setattr(doctor, "everyones", lambda text: [json.dumps(x) for x in theirs])
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    assert doctor.together([both]) == [both, Finding("fix", "process 1, 2: no disk")]
