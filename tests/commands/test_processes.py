"""Two processes train as one does: the same commands, the same losses."""

import json
import signal
import socket
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from capjax.data.sources import open_source
from tests.commands.conftest import train_losses
from tests.commands.test_train import wait_for_step


def start(workdir, config, *arguments, devices, program=("-m", "capjax.cli")) -> subprocess.Popen:
    command = [
        *(sys.executable, *program, "train"),
        f"--config={config}",
        f"--workdir={workdir}",
        f"--num_cpu_devices={devices}",
        *arguments,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(processes: list[subprocess.Popen], status: int = 0) -> list[str]:
    """Waits for the status of all, and returns what each printed."""
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == status, output
    return outputs


def metrics(workdir) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.endswith(NAMES)} for line in lines]


NAMES = ("step", "loss", "grad_norm", "r1", "exact_match", "unigram_f1")
CAPTIONING = ("--config.objective.captioning.parallel_draw=fixed",)
CONTRASTIVE = (
    "--config.objective.captioning.weight=0",
    "--config.objective.contrastive.weight=1",
    "--config.objective.contrastive.chunked=true",
    "--config.model.pool=map",
)


def start_together(workdir, config, *overrides, count=2, **more) -> list[subprocess.Popen]:
    """All of some processes that train together, with four devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = (*overrides, f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}")
    return [
        start(workdir, config, *together, f"--process_id={i}", devices=4 // count, **more)
        for i in range(count)
    ]


def check_alike(two, one) -> None:
    """The first six steps, and the evaluation after them."""
    expected, found = metrics(one), metrics(two)[:7]
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    assert len(expected) == 7
    for line, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=2e-5, atol=1e-7)


SIX_STEPS = ("--config.optimizer.schedule=constant", "--config.mesh.fsdp=2")


@pytest.mark.slow
def test_four_processes_train_two_towers_as_one(tiny_config, tmp_path):
    overrides = (*CONTRASTIVE, *SIX_STEPS, "--config.total_steps=6")
    one, four = tmp_path / "one", tmp_path / "four"
    finish([start(one, tiny_config, *overrides, devices=4)])
    finish(start_together(four, tiny_config, *overrides, count=4))
    check_alike(four, one)
    config = json.loads((four / "config.json").read_text())
    assert config == json.loads((one / "config.json").read_text())


EIGHTEEN = (*CAPTIONING, *SIX_STEPS, "--config.total_steps=18", "--config.evaluate.every_steps=6")


@pytest.fixture(scope="module")
def uninterrupted(tiny_config, tmp_path_factory):
    """The workdir of two processes that trained for 18 steps; and what they printed."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    return workdir, finish(start_together(workdir, tiny_config, *EIGHTEEN))


@pytest.mark.slow
def test_two_processes_train_a_captioner_as_one(uninterrupted, tiny_config, tmp_path):
    workdir, (output, other) = uninterrupted
    six = (*CAPTIONING, *SIX_STEPS, "--config.total_steps=6")
    finish([start(tmp_path / "one", tiny_config, *six, devices=4)])
    check_alike(workdir, tmp_path / "one")
    lines = [f"process {i} on {socket.gethostname()}: 2 x cpu" for i in range(2)]
    assert [line for line in output.splitlines() if line in lines] == lines
    assert "2 x cpu" not in other  # said once


@pytest.mark.slow
def test_a_death_and_a_signal_cost_two_processes_nothing(uninterrupted, tiny_config, tmp_path):
    workdir, again = tmp_path / "run", (tiny_config, *EIGHTEEN, "--heartbeat_timeout=10")
    first, second = start_together(workdir, *again)
    wait_for_step(workdir, 6, first)
    second.kill()
    (output,) = finish([first], status=1)
    second.communicate()
    assert f"capjax: error: process 1 on {socket.gethostname()} has died;" in output

    processes = start_together(workdir, *again)
    wait_for_step(workdir, 9, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes, status=75)
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert all(f"stopped by SIGTERM after step {newest}, which is saved" in x for x in outputs)

    finish(start_together(workdir, *again))
    assert train_losses(workdir) == train_losses(uninterrupted[0])


# `capjax`, where storage answers process 1 no more after step 9.
HANGS = """
import sys, threading
from capjax import cli
from capjax.commands import build

plain = build.training_batches

def hanging(plan, start, on_bad):
    for batch in plain(plan, start, on_bad):
        if max(batch["position"]) >= 9 * 16:
            threading.Event().wait()
        yield batch

if "--process_id=1" in sys.argv:
    build.training_batches = hanging
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_death_of_the_first_and_a_hang_cost_two_processes_nothing(
    uninterrupted, tiny_config, tmp_path
):
    workdir, again = tmp_path / "run", (tiny_config, *EIGHTEEN)
    first, second = start_together(workdir, *again)
    wait_for_step(workdir, 6, first)
    first.kill()
    (output,) = finish([second], status=1)  # not of a signal: JAX did not end it before us
    first.communicate()
    line = f"capjax: error: process 0 on {socket.gethostname()} has died;"
    assert output.splitlines()[-1].startswith(line)

    (tmp_path / "hangs.py").write_text(HANGS)
    hangs = {"program": (str(tmp_path / "hangs.py"),)}
    for output in finish(
        start_together(workdir, *again, "--config.health.watchdog_s=5", **hangs), 75
    ):
        assert "capjax: error: nothing moved for " in output.splitlines()[-1]
    stacks = [(workdir / f"hang-{i}.txt").read_text() for i in range(2)]
    assert ["in hanging" in text for text in stacks] == [False, True]

    finish(start_together(workdir, *again))
    assert train_losses(workdir) == train_losses(uninterrupted[0])


@pytest.mark.slow
def test_another_configuration_is_refused_before_anything_is_written(tiny_config, tmp_path):
    first, second = start_together(tmp_path / "run", tiny_config, "--initialization_timeout=100")
    second.kill()
    second.communicate()
    other = [*second.args, "--config.batch_size=32"]
    second = subprocess.Popen(other, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    outputs = finish([first, second], status=2)
    for output in outputs:
        assert "has batch_size=32, process 0 on" in output.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> tuple[str, ...]:
    """Overrides for two folders of drawings with texts, and four files that are no images."""
    root = tmp_path_factory.mktemp("folders")
    source = open_source("emoji:val")
    for i in range(60):
        example, folder = source[i], root / ("a" if i < 40 else "b")
        folder.mkdir(exist_ok=True)
        image = b"no image" if i in (3, 11) else b"" if i in (17, 41) else example.image
        (folder / f"{i:02d}.png").write_bytes(image)
        (folder / f"{i:02d}.txt").write_text(example.captions[0].text)
    return (
        *("--config.data.source=", "--config.data.styles=", "--config.captions.sources="),
        *(f"--config.data.mixture.{name}={root / name}" for name in "ab"),
        "--config.data.schedule=0:a=3;b=1",
        "--config.captions.datasets.b.max_tokens=4",
        "--config.data.tokenizer.vocab_size=300",
        "--config.evaluate.every_steps=0",
        "--config.objective.captioning.parallel_draw=fixed",
    )


def bad_records(workdir) -> list[dict]:
    files = sorted(workdir.glob("bad_records*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(lines, key=lambda line: line["position"])


def bad_metrics(workdir) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("train/bad/")} for line in lines]


@pytest.mark.slow
def test_two_processes_train_on_a_mixture_with_bad_records_as_one(mixture, tiny_config, tmp_path):
    overrides = (*mixture, "--config.total_steps=8", "--config.data.bad_budget=0.5")
    one, two = tmp_path / "one", tmp_path / "two"
    finish([start(one, tiny_config, *overrides, devices=4)])
    finish(start_together(two, tiny_config, *overrides))
    for line, other in zip(metrics(one), metrics(two), strict=True):
        assert line.keys() == other.keys()
        np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=2e-5, atol=1e-7)
    records = bad_records(one)
    assert bad_records(two) == records
    rows = {record["position"] % 16 // 8 for record in records}
    assert rows == {0, 1}  # both processes had some
    assert all((two / f"bad_records{name}.jsonl").exists() for name in ("", "-1"))
    assert bad_metrics(two) == bad_metrics(one)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    counts = Counter(record["reason"] for record in records)
    assert summaries[0]["bad_records"] == summaries[1]["bad_records"] == counts


@pytest.mark.slow
def test_two_processes_stop_together_beyond_the_budget(mixture, tiny_config, tmp_path):
    overrides = (*mixture, "--config.total_steps=20", "--config.data.bad_budget=0.001")
    for process in start_together(tmp_path, tiny_config, *overrides):
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 2, output
        assert "of 208 examples cannot be used, more than bad_budget=0.001" in output
