"""Two processes train as one does: the same commands, the same losses."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest


def start(workdir, config, *arguments, devices) -> subprocess.Popen:
    command = [
        *(sys.executable, "-m", "capjax.cli", "train"),
        f"--config={config}",
        f"--workdir={workdir}",
        f"--num_cpu_devices={devices}",
        *arguments,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(processes: list[subprocess.Popen]) -> None:
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


def metrics(workdir) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k.endswith(NAMES) and "shuffled" not in k}
        for line in lines
    ]


# Which image takes another's place depends on the rows that a process has: no "shuffled" loss.
NAMES = ("step", "loss", "grad_norm", "r1", "exact_match", "unigram_f1")
CAPTIONING = ("--config.objective.captioning.parallel_draw=fixed",)
CONTRASTIVE = (
    "--config.objective.captioning.weight=0",
    "--config.objective.contrastive.weight=1",
    "--config.objective.contrastive.chunked=true",
    "--config.model.pool=map",
)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [CAPTIONING, CONTRASTIVE], ids=["cappa", "siglip"])
def test_two_processes_train_as_one(overrides, tiny_config, tmp_path):
    overrides = (*overrides, "--config.total_steps=6", "--config.mesh.fsdp=2")
    one, two = tmp_path / "one", tmp_path / "two"
    finish([start(one, tiny_config, *overrides, devices=4)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    finish(
        [
            start(two, tiny_config, *overrides, *together, f"--process_id={i}", devices=2)
            for i in range(2)
        ]
    )
    expected, found = metrics(one), metrics(two)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    assert len(expected) == 7  # six steps and the evaluation at the end
    for line, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=2e-5, atol=1e-7)
    config = json.loads((two / "config.json").read_text())
    assert config == json.loads((one / "config.json").read_text())
