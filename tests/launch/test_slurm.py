"""A real Slurm of two nodes on this machine: a job that is stopped goes on where it was."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands.conftest import REPOSITORY, tiny_config, train_losses

__all__ = ["tiny_config"]  # the fixture
HERE = Path(__file__).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "srun")


def ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    numbers = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return numbers


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """`slurm(*words)` runs one of its programs, and returns what it printed."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"needs {', '.join(missing) or 'root'} "
            "(as root: apt-get install --no-install-recommends slurm-wlm munge)"
        )
    root = tmp_path / "slurm"
    for name in ("state", "spool.n1", "spool.n2"):
        (root / name).mkdir(parents=True)
    config = (HERE / "slurm.conf").read_text()
    values = {"HOST": socket.gethostname(), "DIR": root}
    values |= {f"PORT{i}": port for i, port in enumerate(ports(3))}
    for name, value in values.items():
        config = config.replace(f"@{name}@", str(value))
    (root / "slurm.conf").write_text(config)
    (root / "munge.key").write_bytes(os.urandom(64))
    (root / "munge.key").chmod(0o600)
    monkeypatch.setenv("SLURM_CONF", str(root / "slurm.conf"))

    def slurm(*words: str) -> str:
        result = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert result.returncode == 0, (words, result.stderr)
        return result.stdout

    munge = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munged.log"}
    munge |= {"pid-file": "munged.pid", "seed-file": "munged.seed"}
    try:
        slurm("munged", "--force", *(f"--{flag}={root / name}" for flag, name in munge.items()))
        slurm("slurmctld", "-c")
        for node in ("n1", "n2"):
            slurm("slurmd", "-N", node)
        yield slurm
    finally:
        for path in root.glob("*.pid"):
            os.kill(int(path.read_text()), signal.SIGTERM)


def wait_for(is_so, what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, what()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_job_is_stopped_requeued_and_goes_on_bit_for_bit(
    slurm, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # its capjax
    arguments = ("train", f"--config={tiny_config}", "--config.total_steps=40")
    whole = tmp_path / "whole"
    local = [REPOSITORY / "launch" / "local.sh", "2", "capjax", *arguments, f"--workdir={whole}"]
    subprocess.run(local, check=True, capture_output=True)

    # The detector of JAX dials n1, a name that leads nowhere here.
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{ports(1)[0]}")
    run, log = tmp_path / "run", tmp_path / "capjax.log"
    script = REPOSITORY / "launch" / "slurm" / "train.sbatch"
    answer = slurm(
        *("sbatch", "--parsable", f"--output={log}", str(script)),
        *(*arguments[1:], f"--workdir={run}"),
    )
    job = answer.strip()
    output = lambda: log.read_text() if log.exists() else ""  # noqa: E731
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= 4, output)
    slurm("scancel", "--signal=USR1", job)  # as Slurm does before the end of its time
    wait_for(lambda: f"requeueing job {job}" in output(), output)
    stopped = len(losses(run))
    assert 4 <= stopped < 40
    assert output().count(f"stopped by SIGUSR1 after step {stopped}, which is saved") == 2
    wait_for(lambda: "JobState=PENDING" in slurm("scontrol", "show", "job", job), output)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # it would wait for minutes
    wait_for(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job), output)
    assert f"resuming after step {stopped}" in output()
    assert train_losses(run) == train_losses(whole)


def losses(workdir: Path) -> list[str]:
    return [line for line in (workdir / "metrics.jsonl").read_text().splitlines() if "loss" in line]
