"""The training step of capjax and of its peers, taking turns: wall time, CPU-seconds, ratios.

    BIG_VISION=DIR python tools/bench/train_step_peers.py --image_sizes=64,128 --rounds=3
    python tools/bench/train_step_peers.py --peers=ours,hugging_face:ved --dtypes=float32,bfloat16

In each round every entry runs in a process of its own, for frameworks that share one disturb each
other's threads; but the entries of JAX share one and take turns step by step, so that what else
the machine does falls on all of them (`--no-interleave` parts them too). Each warms up, then its
steps alternate with square matrix products of the same type by the same framework.

Prints a JSON line an entry and round, then a table of medians over rounds:

    ms, CPU-s    of a step; CPU-seconds count all threads
    of GEMM      FLOP/s of the step over those of the products, in wall time; the step's FLOPs are
                 capjax's count for CapPa at these sizes, for every entry
    MFU          the same over the data sheet's bfloat16 peak, where the device is known
    x wall, x CPU  the entry's time over that of the first entry, the median of rounds' ratios

Entries are modules of `peers`, with a variant behind a colon. Ends with status 1 where the losses
of big_vision and capjax differ by more than 1e-4 in the first five steps.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from peers import Job, described, is_jax, prepare
from timing import alternate

DEFAULT_PEERS = "ours,ours:fixed,big_vision,hugging_face:ved,hugging_face:blip"
NUM_LOSSES, TOLERANCE = 5, 1e-4


def measure(entries: list[str], job: Job, steps: int) -> list[dict[str, Any]]:
    """Runs the entries in turns in this process: a line for each."""
    prepared = {entry: prepare(entry, job) for entry in entries}
    losses: dict[str, list[float]] = {entry: [] for entry in entries}
    first = prepared[entries[0]]
    calls: dict[str, Any] = {
        entry: lambda entry=entry: losses[entry].append(prepared[entry].run()) for entry in entries
    }
    timings = alternate(calls | {"gemm": first.gemm}, steps)
    from peers.ours import captioner  # after the measurement: it imports JAX

    flops, gemm = captioner(job).flops_per_example() * job.batch_size, timings.pop("gemm")
    gemm_rate = first.gemm_flops / gemm.wall_s
    return [
        {
            "entry": entry,
            "ms": round(time.wall_s * 1e3, 2),
            "cpu_s": round(time.cpu_s, 4),
            "images_per_s": round(job.batch_size / time.wall_s, 1),
            "tflops_per_s": round(flops / time.wall_s / 1e12, 4),
            "gemm_tflops_per_s": round(gemm_rate / 1e12, 4),
            "share_of_gemm": round(flops / time.wall_s / gemm_rate, 4),
            "mfu": mfu(flops / time.wall_s, prepared[entry].facts["device"]),
            "losses": losses[entry][:NUM_LOSSES],
        }
        | described(job)
        | prepared[entry].facts
        for entry, time in timings.items()
    ]


def mfu(flops_per_s: float, device_kind: str) -> float | None:
    """Share of one device's bfloat16 peak; None where that is not known."""
    from capjax.chips import chip_of

    chip = chip_of(device_kind)
    return round(flops_per_s / chip.peak_flops, 4) if chip else None


def in_process(entries: list[str], job: Job, steps: int, timeout_s: float) -> list[dict[str, Any]]:
    """`measure` in a fresh process; a line that tells of the failure where it fails."""
    work = json.dumps({"entries": entries, "job": job._asdict(), "steps": steps})
    command = [sys.executable, __file__, f"--child={work}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        error = f"took longer than {timeout_s:.0f} s"
    else:
        if not done.returncode:
            return json.loads(done.stdout.splitlines()[-1])
        error = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return [{"entry": entry, "error": error} | described(job) for entry in entries]


def groups(entries: list[str], *, interleave: bool) -> list[list[str]]:
    """The entries of each process."""
    if not interleave:
        return [[entry] for entry in entries]
    together = [entry for entry in entries if is_jax(entry)]
    return [group for group in [together, *([e] for e in entries if not is_jax(e))] if group]


def table(lines: list[dict[str, Any]], base: str) -> str:
    """Markdown: medians over rounds, and the medians of rounds' ratios to `base`."""
    rows = ["| px | type | entry | ms | CPU-s | images/s | of GEMM | MFU | x wall | x CPU |"]
    rows.append("|---|---|---|---|---|---|---|---|---|---|")
    found: dict[Any, list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault((line["image_size"], line["dtype"], line["entry"]), []).append(line)
    for (px, dtype, entry), of_entry in found.items():
        against = {line["round"]: line for line in found.get((px, dtype, base), [])}
        pairs = [(line, against[line["round"]]) for line in of_entry if line["round"] in against]
        ratios = [
            f"{statistics.median(a[unit] / b[unit] for a, b in pairs):.3f}" if pairs else "-"
            for unit in ("ms", "cpu_s")
        ]
        share = "-" if of_entry[0]["mfu"] is None else _median(of_entry, "mfu", 3)
        cells = [_median(of_entry, "ms", 1), _median(of_entry, "cpu_s", 3)]
        cells += [_median(of_entry, "images_per_s", 1), _median(of_entry, "share_of_gemm", 3)]
        cells += [share, *ratios]
        rows.append(f"| {px} | {dtype} | {entry} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _median(lines: list[dict[str, Any]], name: str, decimals: int) -> str:
    return f"{statistics.median(line[name] for line in lines):.{decimals}f}"


def loss_difference(lines: list[dict[str, Any]]) -> float | None:
    """The largest between big_vision's losses and capjax's; None where there are not both.

    With the fixed number of parallel rows capjax's are others.
    """
    found: dict[Any, dict[str, list[float]]] = {}
    for line in lines:
        if "fixed" not in line["entry"]:
            of = found.setdefault((line["image_size"], line["dtype"]), {})
            of.setdefault(line["entry"].partition(":")[0], line["losses"])
    pairs = [(x["ours"], x["big_vision"]) for x in found.values() if {"ours", "big_vision"} <= {*x}]
    return max((abs(a - b) for pair in pairs for a, b in zip(*pair, strict=True)), default=None)


def main() -> int:
    """Runs the rounds and prints lines and table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", default=DEFAULT_PEERS, help="the first is what others are over")
    parser.add_argument("--image_sizes", default="64,128")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="measured, after two that warm up")
    parser.add_argument("--interleave", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--timeout_s", type=float, default=600, help="of one process")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    for name in ("size", "batch_size", "text_length", "vocab_size", "decoder_depth"):
        value = Job._field_defaults[name]
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    if args.child:
        work = json.loads(args.child)
        print(json.dumps(measure(work["entries"], Job(**work["job"]), work["steps"])))
        return 0
    entries, lines = args.peers.split(","), []
    sizes, dtypes = map(int, args.image_sizes.split(",")), args.dtypes.split(",")
    base = Job(args.size, args.decoder_depth, 0, args.batch_size, args.text_length, args.vocab_size)
    places = list(itertools.product(sizes, dtypes))
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)  # later rounds need not compile
        for number, (px, dtype) in itertools.product(range(args.rounds), places):
            job = base._replace(image_size=px, dtype=dtype)
            for group in groups(entries, interleave=args.interleave):
                for line in in_process(group, job, args.steps, args.timeout_s):
                    line["round"] = number
                    print(json.dumps(line), flush=True)
                    lines += [line] * ("error" not in line)
    print("\n" + table(lines, entries[0]))
    difference = loss_difference(lines)
    if difference is not None:
        print(f"\nlosses of big_vision and capjax differ by {difference:.1e} at most")
    return int(difference is not None and difference > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
