"""A corpus job killed at random times, again and again, writes what an uninterrupted one writes."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

KILLS = 20
COUNT, SHARD = 1500, 4


def command(checkpoint, output, *flags: str) -> list[str]:
    inputs = [f"--checkpoint={checkpoint}", "--input=emoji:train", f"--output={output}"]
    sizes = ["--batch_size=4", f"--shard_size={SHARD}", f"--limit={COUNT}", "--num_cpu_devices=1"]
    return [sys.executable, "-m", "capjax.cli", "caption", *inputs, *sizes, *flags]


def shards(path) -> list[str]:
    return sorted(each.name for each in path.glob("captions-*.jsonl"))


def contents(path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir() if each.is_file()}


@pytest.mark.slow
def test_twenty_kills_change_nothing(run_directory, tmp_path):
    sampled = ("--temperature=1", "--dedupe", "--num_captions=2")
    whole = command(run_directory, tmp_path / "whole", *sampled)
    subprocess.run(whole, check=True, capture_output=True, timeout=300)
    path = tmp_path / "killed"
    rng = random.Random(0)
    made, kills_at_work = 0, 0
    for kill in range(KILLS):
        # Once it has added so many shards, or (every fourth) most likely while it still starts.
        target = made + rng.randint(1, COUNT // SHARD // KILLS)
        limit_s = rng.uniform(0, 6) if kill % 4 == 3 else 120
        with (tmp_path / "log").open("wb") as log:
            job = command(run_directory, path, *sampled)
            process = subprocess.Popen(job, stdout=log, stderr=log)
        begin = time.monotonic()
        while len(shards(path)) < target and time.monotonic() - begin < limit_s:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
        kills_at_work += len(shards(path)) > made
        made = len(shards(path))
    assert kills_at_work >= KILLS // 2
    assert made < COUNT // SHARD
    again = subprocess.run(
        command(run_directory, path, *sampled), check=True, capture_output=True, timeout=300
    )
    assert b"1500 captions" in again.stdout
    assert contents(path) == contents(tmp_path / "whole")
    lines = [line for name in shards(path) for line in (path / name).read_text().splitlines()]
    assert [json.loads(line)["index"] for line in lines] == list(range(COUNT))
    assert not list(path.rglob("*.tmp"))
