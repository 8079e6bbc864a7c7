"""Kills a run with kill -9 at random moments, again and again, and compares it with one left alone.

    python tools/chaos.py --kills=100 --processes=2 --output=/tmp/chaos -- \
        train --config=emoji_quickstart --config.total_steps=3000 --config.checkpoint.every_steps=20
    python tools/chaos.py --kills=20 --output=/tmp/chaos_rl -- reinforce \
        --config=emoji_reinforce --checkpoint=runs/vague --towers=runs/siglip

What follows `--` is a command of capjax without its --workdir. It runs once to its end in
OUTPUT/whole, and in OUTPUT/killed with all its processes killed at moments drawn at random: three
in ten while it starts, the others while it trains and saves. Of `--alone` kills only one process is
hit, and the others must end by themselves. After each kill every checkpoint is read and its digests
compared. At the end both runs must have the same losses and the same arrays, bit for bit.

Prints a line for each kill and writes OUTPUT/chaos.json. Exit status 1 where a checkpoint was
damaged, a launch failed by itself, or the two runs differ.
"""

import argparse
import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

from capjax.checkpoint import find_steps, step_directory
from capjax.checkpoint.files import read_metadata
from capjax.checkpoint.reading import verify
from capjax.errors import UserError

STARTING = 0.3  # the share of kills that come before the first step


def main() -> None:
    """Runs it all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--alone", type=int, default=0, help="of these, so many of one process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--window", type=float, default=4.0, help="seconds of steps before a kill")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to end when alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    whole, killed = args.output / "whole", args.output / "killed"
    if not finished(whole):
        log = args.output / "whole.log"
        processes = launch(args.command, whole, args.processes, log)
        statuses = [process.wait() for process in processes]
        if any(statuses):
            raise SystemExit(f"the run that is left alone fails: {tail(log)}")
    result = chaos(args, killed)
    result["differences"] = differences(whole, killed)
    (args.output / "chaos.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "moments"}, indent=1))
    if result["damaged"] or result["failed"] or result["differences"]:
        raise SystemExit(1)


def chaos(args: argparse.Namespace, workdir: Path) -> dict:
    """Launches, kills and launches again until the run ends; what was seen."""
    rng = random.Random(args.seed)
    alone = set(rng.sample(range(args.kills), args.alone))
    start_s, moments, damaged, failed, lost = [15.0], [], [], [], 0
    for number in range(args.kills + 1):
        begin = time.monotonic()
        log = args.output / f"launch_{number:03d}.log"
        processes = launch(args.command, workdir, args.processes, log)
        try:
            if number == args.kills:
                statuses = [process.wait() for process in processes]
            else:
                expected = sum(start_s[-5:]) / len(start_s[-5:])
                is_early = rng.random() < STARTING
                wait_s = rng.uniform(0, expected) if is_early else rng.uniform(0, args.window)
                first = None if is_early else wait_for_step(workdir, processes)
                if first is not None:
                    start_s.append(first - begin)
                end = time.monotonic() + wait_s
                while time.monotonic() < end and all(p.poll() is None for p in processes):
                    time.sleep(0.005)
                statuses = [process.poll() for process in processes]
            if all(status == 0 for status in statuses):
                break
            if any(status is not None for status in statuses):
                failed.append(f"launch {number} ended with {statuses}: {tail(log)}")
                break
            if number in alone:
                failed += kill_one(rng.choice(processes), processes, args.patience)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
        kept = checkpoints(workdir)
        damaged += [f"after kill {number}: {problem}" for _, problem in kept if problem]
        step, newest = logged_step(workdir), max((step for step, _ in kept), default=0)
        lost += max(0, step - newest)
        moments.append({"s": time.monotonic() - begin, "step": step, "kept": newest})
        print(f"kill {number + 1}: step {step}, checkpoint {newest}", flush=True)
    return {
        "command": args.command,
        "processes": args.processes,
        "kills": len(moments),
        "alone": sum(number in alone for number in range(len(moments))),
        "steps_done_again": lost,
        "damaged": damaged,
        "failed": failed,
        "moments": moments,
    }


def launch(command: list[str], workdir: Path, count: int, log: Path) -> list[subprocess.Popen]:
    """The command in `count` processes that find each other."""
    call = [sys.executable, "-m", "capjax.cli", *command, f"--workdir={workdir}"]
    together = []
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
    with log.open("wb") as file:
        return [
            subprocess.Popen(
                [*call, *together, *([f"--process_id={i}"] if count > 1 else [])],
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for i in range(count)
        ]


def wait_for_step(workdir: Path, processes: list[subprocess.Popen]) -> float | None:
    """When this launch logs its first step; None where a process ended first.

    A resumed run cuts off what is beyond its checkpoint: metrics.jsonl shrinks before it grows.
    """
    size = metrics_size(workdir)
    while all(process.poll() is None for process in processes):
        before, size = size, metrics_size(workdir)
        if size > before:
            return time.monotonic()
        time.sleep(0.01)
    return None


def kill_one(
    victim: subprocess.Popen, processes: list[subprocess.Popen], patience_s: float
) -> list[str]:
    """Kills one process; complaints about others that stay for longer than `patience_s`."""
    victim.kill()
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if all(process.poll() is not None for process in processes):
            return []
        time.sleep(0.1)
    return [f"a process outlived its killed peer by {patience_s:g} s"]


def checkpoints(workdir: Path) -> list[tuple[int, str]]:
    """Every checkpoint that claims to be whole, and what is wrong with it ("" for nothing)."""
    try:
        directory, steps = find_steps(workdir)
    except UserError:
        return []
    return [(step, "; ".join(verify(directory, step))) for step in steps]


def differences(one: Path, other: Path) -> list[str]:
    """Where two ended runs differ: losses by step, digests of the newest checkpoint's arrays."""
    found = []
    expected, losses = losses_of(one), losses_of(other)
    if wrong := sorted(
        step for step in expected.keys() | losses.keys() if expected.get(step) != losses.get(step)
    ):
        found.append(f"losses of {len(wrong)} steps, the first at {wrong[0]}")
    newest = []
    for workdir in (one, other):
        directory, steps = find_steps(workdir)
        newest.append((max(steps), read_metadata(step_directory(directory, max(steps)))["arrays"]))
    (step, arrays), (other_step, other_arrays) = newest
    if step != other_step:
        return [*found, f"the newest checkpoints: {step} and {other_step}"]
    wrong_arrays = [
        k for k in arrays.keys() | other_arrays.keys() if arrays.get(k) != other_arrays.get(k)
    ]
    if wrong_arrays:
        found.append(f"{len(wrong_arrays)} of {len(arrays)} arrays, {min(wrong_arrays)} among them")
    return found


def losses_of(workdir: Path) -> dict[int, str]:
    """Step -> loss in hex."""
    return {
        line["step"]: float(line["train/loss"]).hex()
        for line in metrics_of(workdir)
        if "train/loss" in line
    }


def metrics_of(workdir: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # torn by a kill
    return found


def metrics_size(workdir: Path) -> int:
    """Bytes of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return path.stat().st_size if path.is_file() else 0


def logged_step(workdir: Path) -> int:
    """The newest step that was logged."""
    return max((line["step"] for line in metrics_of(workdir)), default=0)


def finished(workdir: Path) -> bool:
    """Whether a run has written its summary."""
    return (workdir / "summary.json").is_file()


def tail(log: Path) -> str:
    """The end of what was printed."""
    return log.read_text(errors="replace")[-600:]


if __name__ == "__main__":
    main()
