"""A long run of a tiny model, watched from outside: memory, open files, compilations.

python tools/soak.py [--steps=3000] [--workdir=DIR]

Prints one line of JSON, and exits with 1 where memory grows by 1 MB or more in 1,000 steps, open
files grow, or something is compiled after the first save. Linux only. The first third of the run
is not counted: until then caches fill.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from capjax.training.metrics import read_metrics

CONFIG = '''
"""The quickstart, shrunk."""
from ml_collections import ConfigDict
import runpy

def get_config(arg=""):
    config = runpy.run_path({quickstart!r})["get_config"]()
    config.batch_size = 8
    config.total_steps = {steps}
    config.data.text_length = 8
    config.data.styles = ("fluent",)
    config.data.tokenizer.vocab_size = 320
    config.preprocessing.image_size = 16
    config.reading.cache_megabytes = 0
    config.model.update(patch_size=8, width=32, depth=1, decoder_depth=1, num_heads=2, mlp_dim=32)
    config.optimizer.update(warmup_steps=2, cooldown_steps=0)
    config.checkpoint.every_steps = {every}
    config.log_every_steps = 10
    config.evaluate.splits = ConfigDict()
    config.tensorboard = False
    return config
'''
MAX_SLOPE = 1.0  # MB in 1,000 steps
EVERY_S = 0.5


class Sample(NamedTuple):
    """Of the process at a moment: the last step logged, bytes held, files open."""

    step: int
    rss: int
    files: int


def main() -> int:
    """Runs, prints, and judges."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--workdir", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = soak(args.workdir or Path(directory) / "run", args.steps)
    print(json.dumps(found))
    is_good = (
        found["exit_status"] == 0
        and found["rss_mb_per_1000_steps"] < MAX_SLOPE
        and found["files_at_the_end"] <= found["files_after_a_third"]
        and found["compiled_after_the_first_save"] == []
    )
    return 0 if is_good else 1


def soak(workdir: Path, steps: int) -> dict:
    """Trains in a process of its own; what was seen of it."""
    every = max(steps // 6, 1)
    workdir.mkdir(parents=True)
    config = workdir.parent / "soak.py"
    quickstart = Path(__file__).parents[1] / "configs" / "emoji_quickstart.py"
    config.write_text(CONFIG.format(quickstart=str(quickstart), steps=steps, every=every))
    process = subprocess.Popen(
        [sys.executable, "-m", "capjax.cli", "train", f"--config={config}", f"--workdir={workdir}"],
        env=os.environ | {"JAX_LOG_COMPILES": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    compiled: list[tuple[int, str]] = []
    last_lines: list[str] = []

    def read() -> None:
        for line in process.stderr:
            last_lines[:] = [*last_lines[-9:], line]
            if "Finished XLA compilation of " in line:
                name = line.split("Finished XLA compilation of ")[1].split(" in ")[0]
                compiled.append((last_step(workdir), name))

    reader = threading.Thread(target=read)
    reader.start()
    samples = []
    while process.poll() is None:
        sample = look(process.pid, workdir)
        if sample is not None and 0 < sample.step < steps:  # afterwards it is taken down
            samples.append(sample)
        time.sleep(EVERY_S)
    reader.join()
    if process.returncode:
        print("".join(last_lines), file=sys.stderr)
    settled = [sample for sample in samples if sample.step >= steps / 3] or samples[-1:]
    return {
        "exit_status": process.returncode,
        "steps": steps,
        "samples": len(settled),
        "rss_mb_per_1000_steps": slope(settled),
        "rss_mb_at_the_end": round(settled[-1].rss / 1e6, 1),
        "rss_mb_by_sixths": [
            round(float(np.median([s.rss for s in part])) / 1e6, 2)
            for sixth in range(6)
            if (part := [s for s in samples if sixth * steps <= 6 * s.step < (sixth + 1) * steps])
        ],
        "files_after_a_third": settled[0].files,
        "files_at_the_end": round(float(np.median([s.files for s in settled[-5:]]))),
        # By the step that was logged last: a step or ten behind.
        "compiled_after_step_2": sum(step >= 2 for step, _ in compiled),
        "compiled_after_the_first_save": [n for step, n in compiled if every + 10 < step < steps],
    }


def slope(samples: list[Sample]) -> float:
    """Megabytes in 1,000 steps, by least squares; 0 of too few."""
    if len({sample.step for sample in samples}) < 3:
        return 0.0
    steps = np.array([sample.step for sample in samples], float)
    return round(float(np.polyfit(steps, [sample.rss for sample in samples], 1)[0]) * 1e-3, 3)


def look(pid: int, workdir: Path) -> Sample | None:
    """The process now; None where it has gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except (OSError, IndexError):
        return None
    return Sample(last_step(workdir), pages * os.sysconf("SC_PAGE_SIZE"), files)


def last_step(workdir: Path) -> int:
    """The last step in the metrics; 0 before the first."""
    path = workdir / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return int(lines[-1]["step"]) if lines else 0


if __name__ == "__main__":
    sys.exit(main())
