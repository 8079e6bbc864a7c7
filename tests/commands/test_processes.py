"""Two processes train as one does: the same commands, the same losses."""

import json
import socket
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from capjax.data.sources import open_source


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
    return [{k: v for k, v in line.items() if k.endswith(NAMES)} for line in lines]


NAMES = ("step", "loss", "grad_norm", "r1", "exact_match", "unigram_f1")
CAPTIONING = ("--config.objective.captioning.parallel_draw=fixed",)
CONTRASTIVE = (
    "--config.objective.captioning.weight=0",
    "--config.objective.contrastive.weight=1",
    "--config.objective.contrastive.chunked=true",
    "--config.model.pool=map",
)


def start_two(workdir, config, *overrides) -> list[subprocess.Popen]:
    """Both of two processes that train together, with two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    return [
        start(workdir, config, *overrides, *together, f"--process_id={i}", devices=2)
        for i in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [CAPTIONING, CONTRASTIVE], ids=["cappa", "siglip"])
def test_two_processes_train_as_one(overrides, tiny_config, tmp_path):
    overrides = (*overrides, "--config.total_steps=6", "--config.mesh.fsdp=2")
    one, two = tmp_path / "one", tmp_path / "two"
    finish([start(one, tiny_config, *overrides, devices=4)])
    finish(start_two(two, tiny_config, *overrides))
    expected, found = metrics(one), metrics(two)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    assert len(expected) == 7  # six steps and the evaluation at the end
    for line, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=2e-5, atol=1e-7)
    config = json.loads((two / "config.json").read_text())
    assert config == json.loads((one / "config.json").read_text())


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
    finish(start_two(two, tiny_config, *overrides))
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
    for process in start_two(tmp_path, tiny_config, *overrides):
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 2, output
        assert "of 208 examples cannot be used, more than bad_budget=0.001" in output
