"""How long a save holds up training: of a captioner's state with its optimizer, digests included.

    python tools/bench/checkpoint.py --rounds=7 --steps=20

A state of AdamW (CapPa S/16 where flags say nothing else, 64 tokens, 8,192 pieces, float32) is
saved by turns; then some steps are trained with a save in the middle. JSON lines:

    save         medians over rounds, of `megabytes` of state: `blocked_s`, until `save` returns and
                 the loop may go on; `whole_s`, until the checkpoint is complete; `orbax_s`, a
                 synchronous save by Orbax alone, without digests and hashes; `blocked_to_whole` and
                 `blocked_to_orbax`, the ratios
    parts        medians of what blocks: `digest_s`, `copy_s` (Orbax takes the state), `rest_s`
    training     `step_s`, a step (median); `blocked_share`, blocked_s of the time between saves,
                 every `every_steps` steps; `slower_s`, what the steps took longer while the save
                 was written in the background
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from timing import timed

from capjax.checkpoint import Checkpointer, RunInfo, checkpointer
from capjax.checkpoint.arrays import named_leaves, state_handler, stored_bytes, stored_data
from capjax.commands.program import Program, build_mesh, build_program
from capjax.commands.settings import load_config
from capjax.data.pipeline import synthetic_batches
from capjax.mesh import place_batch
from capjax.models.presets import variant
from capjax.training.patterns import nested


def program(args: argparse.Namespace) -> Program:
    """The training step of the asked captioner."""
    sizes = {**variant(args.size), "decoder_depth": args.decoder_depth}
    config: ConfigDict = load_config("emoji_quickstart")
    config.model.update({name: value for name, value in sizes.items() if name in config.model})
    config.update(batch_size=args.batch_size)
    config.preprocessing.image_size = args.image_size
    config.data.text_length = 64
    return build_program(config, build_mesh(config, jax.devices()[:1]), vocab_size=8192)


def seconds(call) -> float:
    """Wall time of a call."""
    return timed(call).wall_s


def measure_saves(state, directory: Path, rounds: int) -> dict[str, float]:
    """Medians, the two kinds of save taking turns."""
    found: dict[str, list[float]] = {name: [] for name in ("blocked", "whole", "orbax")}
    with Checkpointer(directory / "ours", RunInfo()) as ours, jax.transfer_guard("allow"):
        for step in range(1, rounds + 2):
            begin = time.perf_counter()
            found["blocked"].append(
                seconds(functools.partial(ours.save, step, state, {"examples_seen": 0}))
            )
            ours.wait()
            found["whole"].append(time.perf_counter() - begin)
            arrays = {name: stored_data(x) for name, x in named_leaves(state).items()}
            plain = ocp.Checkpointer(state_handler())
            target, item = directory / f"orbax-{step}", ocp.args.PyTreeSave(nested(arrays))
            found["orbax"].append(seconds(lambda t=target, i=item, p=plain: p.save(t, args=i)))
            plain.close()
            shutil.rmtree(target)
    medians = {name: statistics.median(values[1:]) for name, values in found.items()}
    blocked = medians["blocked"]
    return {
        "megabytes": stored_bytes(state) / 1e6,
        **{f"{name}_s": value for name, value in medians.items()},
        "blocked_to_whole": blocked / medians["whole"],
        "blocked_to_orbax": blocked / medians["orbax"],
    }


def measure_parts(state, directory: Path, rounds: int) -> dict[str, float]:
    """What a save waits for, timed where it calls it."""
    spent: dict[str, list[float]] = {"digest": [], "copy": [], "all": []}

    def clocked(name, call):
        def wrapper(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[name].append(time.perf_counter() - begin)

        return wrapper

    digest = checkpointer.digest_lanes
    with Checkpointer(directory / "parts", RunInfo()) as ours:
        checkpointer.digest_lanes = clocked("digest", digest)
        ours._orbax.save = clocked("copy", ours._orbax.save)
        for step in range(1, rounds + 2):
            clocked("all", ours.save)(step, state, {"examples_seen": 0})
            ours.wait()
    checkpointer.digest_lanes = digest
    medians = {name: statistics.median(values[1:]) for name, values in spent.items()}
    rest = medians["all"] - medians["digest"] - medians["copy"]
    return {"digest_s": medians["digest"], "copy_s": medians["copy"], "rest_s": rest}


def measure_training(made: Program, state, directory: Path, args) -> dict[str, float]:
    """Steps with one save among them, half way."""
    config = made.config
    rows = synthetic_batches(
        image_size=config.preprocessing.image_size,
        text_length=config.data.text_length,
        vocab_size=8192,
        batch_size=config.batch_size,
        seed=0,
    )
    batch = place_batch(made.mesh, next(rows))
    took: list[float] = []
    blocked = 0.0
    with Checkpointer(directory / "training", RunInfo()) as ours:
        for step in range(args.steps + 2):
            if step == args.steps // 2 + 2:
                begin = time.perf_counter()
                ours.save(step, state, {"examples_seen": 0})
                blocked = time.perf_counter() - begin
            begin = time.perf_counter()
            state, metrics = made.train_step(state, batch)
            jax.block_until_ready((state, metrics))
            took.append(time.perf_counter() - begin)
    before, after = took[2 : args.steps // 2 + 2], took[args.steps // 2 + 2 :]
    step_s = statistics.median(before)
    return {
        "step_s": step_s,
        "every_steps": args.every_steps,
        "blocked_s": blocked,
        "blocked_share": blocked / (blocked + args.every_steps * step_s),
        "slower_s": sum(after) - len(after) * step_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="S/16")
    parser.add_argument("--decoder_depth", type=int, default=2)
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every_steps", type=int, default=500)
    parser.add_argument("--directory", help="where to write (default: the temporary one)")
    args = parser.parse_args()
    made = program(args)
    facts = {"size": args.size, "device": jax.devices()[0].device_kind, "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory(dir=args.directory) as temporary, jax.set_mesh(made.mesh):
        directory = Path(temporary)
        state = jax.block_until_ready(jax.jit(made.init_state)())
        print(json.dumps({"save": measure_saves(state, directory, args.rounds), **facts}))
        print(json.dumps({"parts": measure_parts(state, directory, args.rounds)}), flush=True)
        if args.steps:
            print(json.dumps({"training": measure_training(made, state, directory, args)}))


if __name__ == "__main__":
    main()
