"""`capjax train` as a user runs it: killed, resumed, damaged, on other meshes, with bad input."""

import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from capjax import cli
from capjax.checkpoint import load_params
from tests.commands.conftest import finish, start, train_losses

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(tiny_config, tmp_path_factory):
    """The workdir of a run that nobody interrupted."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    output = finish(start("train", f"--config={tiny_config}", f"--workdir={workdir}"))
    assert "done: 24 steps" in output
    return workdir


def test_a_run_leaves_what_the_contract_names(reference):
    losses = train_losses(reference)
    assert sorted(losses) == list(range(1, 25))
    first, last = float.fromhex(losses[1]), float.fromhex(losses[24])
    assert abs(first - np.log(320)) < 0.1  # a zero head: every piece is as likely
    assert last < first - 1
    config = json.loads((reference / "config.json").read_text())
    assert config["model"]["width"] == 32
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["steps"] == 24
    assert summary["examples_seen"] == 24 * 16
    lines = [json.loads(x) for x in (reference / "metrics.jsonl").read_text().splitlines()]
    evaluated = {name for line in lines for name in line if name.startswith("eval/concept/")}
    for metric in ("loss", "perplexity", "parallel_perplexity", "exact_match", "unigram_f1"):
        assert f"eval/concept/{metric}" in evaluated
    records = [
        json.loads(x) for x in (reference / "captions" / "concept.jsonl").read_text().splitlines()
    ]
    assert len(records) == 124
    assert {"key", "caption", "logprob", "num_tokens", "guidance_scale", "seed"} <= set(records[0])


def wait_for_step(workdir, step: int, process) -> None:
    """Returns as soon as the run has logged `step`."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        path = workdir / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b'"train/loss"') >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} never came: {process.poll()}")


def test_killed_or_stopped_at_any_moment_it_goes_on_bit_for_bit(tiny_config, reference, workdir):
    command = ("train", f"--config={tiny_config}", f"--workdir={workdir}")
    moments = (  # before the first checkpoint, about the times of later saves, and in one of them
        (2, signal.SIGKILL, -9, 4),
        (6, signal.SIGTERM, 75, 1),
        (11, signal.SIGKILL, -9, 4),
        (17, signal.SIGINT, 130, 4),
    )
    for lines, number, status, every in moments:
        process = start(*command, f"--config.checkpoint.every_steps={every}")
        wait_for_step(workdir, lines, process)
        os.kill(process.pid, number)
        output, _ = process.communicate()
        assert process.returncode == status, output
        if status > 0:
            newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
            name = signal.Signals(number).name
            assert f"capjax: stopped by {name} after step {newest}, which is saved" in output
    output = finish(start(*command))
    assert "resuming after step" in output
    assert train_losses(workdir) == train_losses(reference)
    ours, theirs = load_params(workdir), load_params(reference)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    finish(start(*command))  # once more: nothing is left to do, and nothing is lost
    assert train_losses(workdir) == train_losses(reference)


def test_damage_of_the_newest_checkpoint_costs_the_steps_since_the_one_before(
    tiny_config, reference, workdir
):
    command = ("train", f"--config={tiny_config}", f"--workdir={workdir}")
    process = start(*command)
    wait_for_step(workdir, 14, process)
    process.kill()
    process.communicate()
    newest = sorted((workdir / "checkpoints").glob("[0-9]" * 8))[-1]
    bulk = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(bulk.read_bytes())
    content[len(content) // 2] ^= 1
    bulk.write_bytes(content)
    output = finish(start(*command))
    assert f"step {int(newest.name)} is damaged" in output
    assert train_losses(workdir) == train_losses(reference)


def test_the_mesh_does_not_change_the_numbers(tiny_config, reference, tmp_path):
    expected = {k: float.fromhex(v) for k, v in train_losses(reference).items()}
    for mesh in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        workdir = tmp_path / "-".join(mesh)
        flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        finish(
            start(
                "train",
                f"--config={tiny_config}",
                f"--workdir={workdir}",
                "--config.total_steps=6",
                "--config.optimizer.schedule=constant",
                *flags,
                devices=8,
            )
        )
        for step, loss in train_losses(workdir).items():
            assert float.fromhex(loss) == pytest.approx(expected[step], rel=2e-5), (mesh, step)


def test_a_resume_may_change_the_mesh(tiny_config, reference, workdir):
    command = ("train", f"--config={tiny_config}", f"--workdir={workdir}")
    process = start(*command)
    wait_for_step(workdir, 10, process)
    process.kill()
    process.communicate()
    flags = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
    output = finish(start(*command, *flags, devices=8))
    assert "mesh.fsdp: 1 -> 4" in output
    ours, theirs = train_losses(workdir), train_losses(reference)
    assert sorted(ours) == sorted(theirs)
    for step in ours:
        difference = float.fromhex(ours[step]) - float.fromhex(theirs[step])
        assert abs(difference) < 2e-3, step  # 24 steps of Adam magnify the order of the sums


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny_config, workdir, capsys
):
    config = workdir.parent / "explodes.py"
    config.write_text(
        "import runpy\n"
        "def get_config(arg=''):\n"
        f"    config = runpy.run_path({str(tiny_config)!r})['get_config']()\n"
        "    config.optimizer.update(learning_rate=1e38, warmup_steps=6, grad_clip_norm=0.0)\n"
        "    config.checkpoint.every_steps = 1\n"
        "    config.mesh.data = 8\n"
        "    return config\n"
    )
    status = cli.main(["train", f"--config={config}", f"--workdir={workdir}"])
    error = capsys.readouterr().err
    assert status == 2
    assert "training is not finite at step" in error
    assert "is kept" in error
    params = load_params(workdir).params
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
