"""All that is measured on a GPU machine, in one command of ten minutes.

    python tools/bench/gpu.py --output=DIR          # on a GPU
    python tools/bench/gpu.py --output=DIR --smoke  # tiny sizes, on any machine: does it run?

In the order of weight: CapPa L/14 and B/16 at 224 px in bfloat16 (MFU, share of the GEMM rate
measured in the same process); Hugging Face's VisionEncoderDecoder under torch.compile and eager at
the same sizes, where torch finds the GPU; the loop fed by the real pipeline; S/16; the start of a
fresh process, cold and warm; remat policies, attention by XLA, independent draws, scanned layers.

Each part is a process of its own with a time limit, so one that fails loses no other; none begins
after --minutes. JSON lines and, at the end, tables go to stdout and to DIR (lines.jsonl, gpu.md).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from peers import Job, described
from train_step_peers import in_process, table

# What a line must reach, by part.
BARS = {
    "L/14": "MFU >= 0.50 (stretch 0.55)",
    "B/16": "MFU >= 0.40",
    "fed": "ratio >= 0.97",
    "torch": ">= 2 times the wall time of ours under torch.compile",
    "start-up": "total <= 60 s cold, <= 15 s warm",
}
OURS = "ours:fixed+unrolled"
TORCH = "import torch, transformers; assert torch.cuda.is_available()"


class Part(NamedTuple):
    """Entries that take turns in one process on a job; or the arguments of another script."""

    name: str
    limit_s: float
    job: Job = Job()
    entries: tuple[str, ...] = ()
    script: str = ""
    flags: tuple[str, ...] = ()


def parts(*, smoke: bool) -> list[Part]:
    """All parts, the weightiest first."""
    common = Job(image_size=224, text_length=64, dtype="bfloat16")
    large = common._replace(size="L/14", decoder_depth=12, batch_size=256)
    base, small = common._replace(size="B/16", batch_size=512), common._replace(batch_size=1024)
    if smoke:
        tiny = Job("mu/16", 1, 32, 8, 8, 640, "bfloat16")
        large, base, small = tiny, tiny._replace(batch_size=16), tiny._replace(batch_size=32)
    few = ("--steps=4", "--num_photos=64") if smoke else ()
    variants = (
        OURS,
        "ours:unrolled",
        *(f"{OURS}+{x}" for x in ("xla", "dots", "full")),
        "ours:fixed",
    )
    half = large._replace(batch_size=large.batch_size // 2)  # what torch has memory for
    return [
        Part("L/14", 180, large, (OURS,)),
        Part("L/14", 120, half, (OURS,)),
        Part("B/16", 120, base, (OURS,)),
        Part("torch", 200, half, ("hugging_face:ved+compile",)),
        Part("fed", 150, large, script="fed.py", flags=few),
        Part("fed", 120, base, script="fed.py", flags=few),
        Part("torch", 90, half, ("hugging_face:ved",)),
        Part("S/16", 90, small, (OURS,)),
        Part("start-up", 150, large, script="startup.py", flags=("--rounds=1", "--entries=ours")),
        Part("variants", 400, half, variants),
        Part("torch", 120, base, ("hugging_face:ved+compile",)),
    ]


def run_part(part: Part, steps: int, limit_s: float) -> list[dict[str, Any]]:
    """The lines of a part; one with `error` where it fails."""
    if part.entries:
        return in_process(list(part.entries), part.job, steps, limit_s)
    settings = [f"--{name}={value}" for name, value in described(part.job).items()]
    path = Path(__file__).with_name(part.script)
    command = [sys.executable, str(path), *settings, *part.flags]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return [{"error": f"took longer than {limit_s:.0f} s"} | described(part.job)]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        lines.append({"error": error})
    return [described(part.job) | line for line in lines]


def has_torch(*, smoke: bool) -> bool:
    """Whether torch and transformers are here and see the GPU (with `smoke`, a CPU will do)."""
    check = TORCH.partition(";")[0] if smoke else TORCH
    return subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0


def report(lines: list[dict[str, Any]]) -> str:
    """Markdown: a table of the steps, then one line for each other part."""
    texts = []
    steps = [line | {"round": 0} for line in lines if "ms" in line]
    for size, batch in dict.fromkeys((line["size"], line["batch_size"]) for line in steps):
        of = [line for line in steps if (line["size"], line["batch_size"]) == (size, batch)]
        seen: dict[str, dict[str, Any]] = {}
        for line in of:  # a variant's reference, measured again, is left to the lines
            seen.setdefault(line["entry"], line)
        texts.append(f"## {size}, batch {batch}\n\n{table(list(seen.values()), OURS)}")
    texts.append("## Other parts")
    for line in lines:
        if "ms" not in line:
            facts = {k: v for k, v in line.items() if k not in described(Job())}
            texts.append(f"- {line['size']} batch {line['batch_size']}: `{json.dumps(facts)}`")
    texts.append("## Bars\n\n" + "\n".join(f"- {part}: {bar}" for part, bar in BARS.items()))
    return "\n\n".join(texts) + "\n"


def main() -> None:
    """Runs the parts while there is time, and writes what they found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("bench-gpu"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", type=int, default=20, help="measured, of each entry")
    parser.add_argument("--only", default="", help="names of parts, joined by commas")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    deadline, lines = time.monotonic() + 60 * args.minutes, []
    chosen = [p for p in parts(smoke=args.smoke) if not args.only or p.name in args.only.split(",")]
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    with_torch = has_torch(smoke=args.smoke)
    with tempfile.TemporaryDirectory() as cache, (args.output / "lines.jsonl").open("w") as file:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        for part in chosen:
            left_s = deadline - time.monotonic()
            begin = time.monotonic()
            if part.name == "torch" and not with_torch:
                found = [{"error": "torch finds no GPU here, or is not installed"}]
            elif left_s <= 0:
                found = [{"error": f"not begun: {args.minutes:g} minutes are over"}]
            else:
                found = run_part(part, 2 if args.smoke else args.steps, min(part.limit_s, left_s))
            seconds = round(time.monotonic() - begin, 1)
            for line in found:
                line = described(part.job) | {"part": part.name, "part_s": seconds} | line
                print(json.dumps(line), flush=True)
                file.write(json.dumps(line) + "\n")
                file.flush()
                lines.append(line)
    (args.output / "gpu.md").write_text(report(lines))
    print("\n" + report(lines))


if __name__ == "__main__":
    main()
