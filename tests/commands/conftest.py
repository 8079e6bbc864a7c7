"""A config so small that whole runs of `capjax train` take seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TINY = '''
"""The quickstart, shrunk."""
from ml_collections import ConfigDict
import runpy

def get_config(arg=""):
    config = runpy.run_path({quickstart!r})["get_config"]()
    config.batch_size = 16
    config.total_steps = 24
    config.data.text_length = 8
    config.data.styles = ("fluent",)
    config.data.tokenizer.vocab_size = 320
    config.preprocessing.image_size = 16
    config.model.update(patch_size=8, width=32, depth=1, decoder_depth=1, num_heads=2, mlp_dim=32)
    config.optimizer.update(warmup_steps=2, cooldown_steps=0)
    config.checkpoint.every_steps = 4
    config.log_every_steps = 1
    config.evaluate.every_steps = 0
    config.evaluate.batch_size = 32
    config.evaluate.splits = ConfigDict({{"concept": "emoji:concept"}})
    config.tensorboard = False
    return config
'''
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Path:
    """The file of a config for `--config`."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY.format(quickstart=str(REPOSITORY / "configs" / "emoji_quickstart.py")))
    return path


def start(*arguments: str, devices: int = 1) -> subprocess.Popen:
    """`capjax ARGUMENTS` in a process of its own, on so many virtual devices."""
    command = [sys.executable, "-m", "capjax.cli", *arguments, f"--num_cpu_devices={devices}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    """Waits for success, and returns what was printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def train_losses(workdir: Path) -> dict[int, str]:
    """Step -> the loss of that step, in hex."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: float(x["train/loss"]).hex() for x in lines if "train/loss" in x}
