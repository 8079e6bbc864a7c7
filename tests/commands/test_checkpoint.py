"""`capjax checkpoint`: what it prints of good and of damaged checkpoints, and its exit status."""

import jax.numpy as jnp
import pytest

from capjax import cli
from capjax.checkpoint import Checkpointer, RunInfo


@pytest.fixture
def run(workdir, monkeypatch):
    """A workdir with checkpoints of steps 10 and 20; the devices are set up already."""
    monkeypatch.setattr("capjax.commands.runtime.start", lambda args: None)
    state = {"params": {"w": jnp.arange(250_000.0)}, "step": jnp.int32(1)}
    with Checkpointer(workdir / "checkpoints", RunInfo(tokenizer_model=b"abc")) as checkpointer:
        for step in (10, 20):
            checkpointer.save(step, state, {"examples_seen": 128 * step})
    return workdir


def spoil(run, step: int) -> None:
    (run / "checkpoints" / f"{step:08d}" / "tokenizer.model").write_bytes(b"abd")


def test_list(run, capsys):
    spoil(run, 20)
    assert cli.main(["checkpoint", "list", str(run)]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "examples", "seen", "size", "MB", "age", "good"]
    step, seen, size, age, unit, good = first.split()
    assert (step, seen, size, unit, good) == ("10", "1,280", "1.0", "s", "yes")
    assert 0 <= int(age) < 60
    assert second.split(maxsplit=1) == ["20", "NO: tokenizer.model does not match its hash"]


def test_verify(run, capsys):
    assert cli.main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out == "step 10: good\nstep 20: good\n"
    spoil(run, 10)
    with pytest.raises(SystemExit) as stop:
        cli.main(["checkpoint", "verify", str(run)])
    assert stop.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "step 10: tokenizer.model does not match its hash",
        "step 10: DAMAGED",
        "step 20: good",
    ]
    assert cli.main(["checkpoint", "verify", str(run), "--step", "20"]) == 0
    assert cli.main(["checkpoint", "verify", str(run / "checkpoints" / "00000020")]) == 0


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["list", "{run}/nothing"], "no checkpoint in {run}/nothing (there is no such directory)"),
        (
            ["verify", "{run}", "--step", "30"],
            "--step=30: {run}/checkpoints has the checkpoints [1",
        ),
        (["verify"], "the following arguments are required: path"),
    ],
)
def test_wrong_input(run, capsys, args, line):
    assert cli.main(["checkpoint", *(arg.format(run=run) for arg in args)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("capjax: error: " + line.format(run=run))
    assert printed.err.count("\n") == 1
