"""The time to the first step of a fresh process: capjax's command, and big_vision beside it.

    BIG_VISION=DIR python tools/bench/startup.py --rounds=3

Each round starts every entry cold, with an empty compile cache, and then warm, on the cache which
that left: CapPa S/16 at 128 px, batch 32, 32 tokens, 32,000 pieces, float32, AdamW, where flags say
nothing else. `ours` is `capjax train` on synthetic data, up to the end of the first step;
`ours_deep` has twice the layers of encoder and decoder; `big_vision` and `big_vision:scan` are its
jitted init, its step and no input pipeline. Prints a JSON line a start, then a table of medians,
and how much longer twice the layers take to compile. Seconds, from the start of the process:

    import   the interpreter, JAX, and the modules that a run needs
    build    settings, mesh, tokenizer, shapes (capjax alone)
    init     parameters and optimizer state, with their compile
    trace    tracing and lowering the step: capjax does so, and compiles it, beside `init`
    compile  compiling it, or finding it in the cache
    wait     for the compile, after all else (capjax alone)
    step     running it once
    other    workdir, checkpointer, writers, the first batch (capjax alone)
    cpu      CPU-seconds of the process, in all its threads
"""

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from peers import Job, described

TIMES_DEPTH = {"ours": 1, "ours_deep": 2}
PARTS = ("import", "build", "init", "trace", "compile", "wait", "step", "other", "total", "cpu")
ASIDE = ("trace", "compile")  # what capjax does in a thread


class Stopwatch:
    """Seconds by the name of a part."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    def timed(self, name: str, function):
        """`function`, its calls adding to the part; they wait for the arrays that they return."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            import jax

            begin = time.perf_counter()
            found = function(*args, **kwargs)
            if name != "build":
                jax.block_until_ready(jax.tree.leaves(found))
            self.parts[name] = self.parts.get(name, 0) + time.perf_counter() - begin
            return found

        return call

    def report(self, total: float, aside: tuple[str, ...] = ()) -> None:
        """Prints the parts, which end the process: nothing is saved."""
        parts = {name: round(self.parts.get(name, 0), 2) for name in PARTS}
        in_turn = sum(seconds for name, seconds in self.parts.items() if name not in aside)
        parts |= {"total": round(total, 2), "other": round(total - in_turn, 2)}
        parts["cpu"] = round(time.process_time(), 2)
        print(json.dumps(parts), flush=True)
        os._exit(0)

    def first_step(self, step, *args) -> None:
        """The jitted step on its first arguments, part by part."""
        lowered = self.timed("trace", step.lower)(*args)
        compiled = self.timed("compile", lowered.compile)()
        self.timed("step", compiled)(*args)


def start_ours(entry: str, job: Job, directory: Path) -> None:
    """`capjax train` in this process, which ends after the first step."""
    from capjax import cli
    from capjax.commands import build, evaluators, summary, train  # noqa: F401
    from capjax.models.presets import variant
    from capjax.training import loop, metrics, profile, progress, workdir  # noqa: F401

    watch = Stopwatch()
    watch.parts["import"] = progress.process_age_s()
    build_run, compiled_ahead = watch.timed("build", build.build_run), train.compiled_ahead

    def lower(plan, *types):
        lowered = watch.timed("trace", plan.train_step.lower)(*types)

        def compiled(**options):
            step = watch.timed("compile", lowered.compile)(**options)
            return lambda *args: (time.perf_counter(), watch.timed("step", step)(*args))

        return mock.Mock(compile=compiled)

    def build_watched(*args):
        plan = build_run(*args)
        step = mock.Mock(lower=functools.partial(lower, plan))
        return plan._replace(train_step=step)

    def watched_ahead(*args):
        step = compiled_ahead(*args)

        def first_step(*args) -> None:
            begin = time.perf_counter()
            ready, _ = step(*args)
            watch.parts["wait"] = ready - begin
            watch.report(progress.process_age_s(), ASIDE)

        return first_step

    mock.patch.object(build, "build_run", build_watched).start()
    mock.patch.object(train, "compiled_ahead", watched_ahead).start()
    mock.patch.object(train, "first_state", watch.timed("init", train.first_state)).start()
    fields = {
        "data.source": "synthetic",
        "data.tokenizer.path": directory / "tokenizer.model",
        "data.text_length": job.text_length,
        "preprocessing.image_size": job.image_size,
        "batch_size": job.batch_size,
        "total_examples": 1000 * job.batch_size,
        "evaluate.batch_size": job.batch_size,
        "model.dtype": job.dtype,
        "model.remat": "none",
        "model.variant": job.size,
        "model.depth": TIMES_DEPTH[entry] * variant(job.size)["depth"],
        "model.decoder_depth": TIMES_DEPTH[entry] * job.decoder_depth,
        "optimizer.name": "adamw",
        "optimizer.warmup_steps": 0,
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    sys.exit(cli.main(["train", "--config=cappa_s16", f"--workdir={directory / entry}", *flags]))


def start_big_vision(entry: str, job: Job) -> None:
    """Its initialisation and first step, as its trainer runs them."""
    watch = Stopwatch()
    begin = time.perf_counter()
    import jax
    import jax.numpy as jnp
    import optax  # noqa: F401
    from peers.big_vision_checkout import modules

    modules()
    watch.parts["import"] = time.perf_counter() - begin
    from peers import big_vision, ours  # capjax's part in the benchmark: not counted

    job = job._replace(variant=entry.partition(":")[2])
    rows = ours.batch_of(job)
    begin = time.perf_counter()
    model, utils = big_vision.model_of(job)
    tx, batch = big_vision.optimizer(), big_vision.batch_of(rows)
    key = jax.random.PRNGKey(0)
    init = jax.jit(lambda key: model.init(key, batch["image"], batch["tokens"])["params"])
    params = watch.timed("init", init)(key)
    opt = watch.timed("init", jax.jit(tx.init))(params)
    step = big_vision.update_of(model, utils, tx)
    watch.first_step(step, params, opt, key, batch, jnp.zeros(job.batch_size))
    watch.report(watch.parts["import"] + time.perf_counter() - begin)


def start(entry: str, job: Job, directory: Path, cache: Path) -> dict[str, Any]:
    """The parts of a fresh process of `entry`."""
    work = json.dumps({"entry": entry, "job": job._asdict(), "directory": str(directory)})
    command = [sys.executable, __file__, f"--child={work}"]
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer of at most so many pieces, trained on words that mean nothing."""
    from capjax.data.tokenizer import Tokenizer

    draw = random.Random(0)

    def syllable() -> str:
        return draw.choice("bcdfghjklmnprstvwz") + draw.choice("aeiou")

    words = ["".join(syllable() for _ in range(4)) for _ in range(120_000)]
    lines = [" ".join(words[i : i + 20]) for i in range(0, len(words), 20)]
    path.write_bytes(Tokenizer.train(lines, vocab_size).model_bytes)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: medians over rounds, seconds."""
    rows = [f"| entry | cache | {' | '.join(PARTS)} |", "|---" * (len(PARTS) + 2) + "|"]
    for place in dict.fromkeys((line["entry"], line["cache"]) for line in lines):
        of = [line for line in lines if (line["entry"], line["cache"]) == place]
        cells = [f"{statistics.median(line[part] for line in of):.2f}" for part in PARTS]
        rows.append(f"| {' | '.join((*place, *cells))} |")
    return "\n".join(rows)


def growth(lines: list[dict[str, Any]]) -> float | None:
    """Compile time cold of twice the layers over that of once, the median of rounds' ratios."""
    cold = {(x["round"], x["entry"]): x["compile"] for x in lines if x["cache"] == "cold"}
    ratios = [
        cold[number, "ours_deep"] / seconds
        for (number, entry), seconds in cold.items()
        if entry == "ours" and (number, "ours_deep") in cold
    ]
    return statistics.median(ratios) if ratios else None


def main() -> None:
    """Prints the lines and the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = "ours,ours_deep" + ",big_vision,big_vision:scan" * ("BIG_VISION" in os.environ)
    parser.add_argument("--entries", default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    for name, value in described(Job()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    if args.child:
        work = json.loads(args.child)
        if work["entry"] in TIMES_DEPTH:
            start_ours(work["entry"], Job(**work["job"]), Path(work["directory"]))
        start_big_vision(work["entry"], Job(**work["job"]))
    job, lines = Job(**{name: getattr(args, name) for name in described(Job())}), []
    with tempfile.TemporaryDirectory() as scratch:
        write_tokenizer(Path(scratch) / "tokenizer.model", job.vocab_size)
        for number in range(args.rounds):
            for entry in args.entries.split(","):
                cache = Path(scratch) / f"cache-{number}-{entry.replace(':', '-')}"
                for state in ("cold", "warm"):
                    about = {"entry": entry, "cache": state, "round": number}
                    line = about | start(entry, job, Path(scratch), cache)
                    print(json.dumps(line), flush=True)
                    lines += [line] * ("error" not in line)
    print("\n" + table(lines))
    if ratio := growth(lines):
        print(f"\ncompiling twice the layers takes {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
