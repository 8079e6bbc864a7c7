"""`capjax plan`, in processes of its own: the CPU stands in for GPUs, libtpu for TPUs."""

import json
import subprocess
import sys

import pytest

SMALL = (
    "--config=emoji_quickstart",
    "--config.batch_size=64",
    "--config.model.depth=2",
    "--config.model.decoder_depth=1",
)


def plan(*arguments):
    command = [sys.executable, "-m", "capjax.cli", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_an_estimate_for_gpus(tmp_path):
    output = tmp_path / "plan.json"
    done = plan(*SMALL, "--topology=h100:16", f"--output={output}", "--shardings")
    assert done.returncode == 0, done.stderr
    assert "estimate" in done.stdout and "fits" in done.stdout
    assert "params/encoder" in done.stdout  # the shardings
    assert max(map(len, done.stdout.split("memory of a")[1].splitlines())) <= 100
    facts = json.loads(output.read_text())
    assert facts["is_estimate"] and facts["num_chips"] == 16 and facts["memory"]["fits"]
    assert facts["flops"]["model_per_step"] == 64 * facts["flops"]["model_per_image"]
    low, high = facts["time"]["overlapped"], facts["time"]["sequential"]
    assert 0 < high["mfu"] <= low["mfu"] <= 1.05  # products of the pad are not the model's


def test_a_batch_that_does_not_fit_says_what_to_change():
    done = plan(
        "--config=cappa_g14",
        "--topology=a100-40gb:8",
        "--config.model.remat=none",
        "--config.optimizer.name=adamw",
    )
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT" in done.stdout
    for words in ("model.remat=dots or full", "batch_size=", "accumulation_steps="):
        assert words in done.stdout


def test_the_search_of_an_estimate(tmp_path):
    output = tmp_path / "plan.json"
    done = plan(*SMALL, "--topology=a100-40gb:8", "--search", f"--output={output}")
    assert done.returncode == 0, done.stderr
    facts = json.loads(output.read_text())
    assert len(facts["tries"]) <= 6
    assert facts["largest_batch"] == facts["batch_size"] > 64
    assert facts["memory"]["needed"] > 0.9 * facts["memory"]["available"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*SMALL, "--topology=v5x:8x8"), "did you mean"),
        ((*SMALL, "--topology=h100:3"), "batch_size=64"),
        ((*SMALL, "--topology=h100:8", "--output=/no/such/place.json"), "--output"),
        (
            ("--config=cappa_l14", "--topology=h100:8", "--config.optimizer.cooldown_epochs=1"),
            "data.source",
        ),
    ],
)
def test_bad_input(arguments, words):
    done = plan(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_step_compiled_for_a_tpu(tmp_path):
    pytest.importorskip("libtpu", reason="needs libtpu (pip install 'capjax[plan]')")
    output = tmp_path / "plan.json"
    done = plan(*SMALL, "--topology=2*v5e:2x2", "--config.mesh.replica=2", f"--output={output}")
    assert done.returncode == 0, done.stderr
    facts = json.loads(output.read_text())
    assert not facts["is_estimate"] and facts["memory"]["temporaries"] > 0
    slow = [network for network in facts["time"]["networks"] if network["is_slow"]]
    assert slow and all("replica" in network["axes"] for network in slow)
