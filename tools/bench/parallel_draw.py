"""The CapPa step with a fixed draw of modes against the one with independent draws.

    python tools/bench/parallel_draw.py --rounds=10

Both steps are compiled first, then take turns in one process, on the same state and batch (CapPa
S/16 at 128 px, 64 tokens, 32,000 pieces, in float32, where flags say nothing else). Prints one JSON
line a step and one that compares them:

    ms           the median wall time of a step, which other users of the machine lengthen
    cpu_s        the median of its seconds of this process's cores, which they hardly do
    gflops       what XLA counts in the lowered program of the unrolled model; to that the loop of
                 the output layer is added, of which it sees one round only
    ratio_*      fixed / bernoulli: of wall time and of CPU-seconds the median over rounds
    flops_saved  1 - fixed / bernoulli
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from capjax.data.pipeline import synthetic_batches
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.presets import variant
from capjax.models.text_decoder import pad_to_lanes
from capjax.objectives.captioning import captioning_loss
from capjax.objectives.cross_entropy import NUM_CHUNKS
from capjax.objectives.objective import mean_over_rows
from capjax.training.optimizer import OptimizerConfig, make_optimizer
from capjax.training.state import TrainState, init_state
from capjax.training.step import make_train_step

DRAWS = ("bernoulli", "fixed")


def captioner(args: argparse.Namespace, *, scan: bool) -> Captioner:
    """CapPa of the asked size."""
    return Captioner(
        CaptionerConfig(
            **variant(args.size),
            image_size=args.image_size,
            decoder_depth=args.decoder_depth,
            vocab_size=args.vocab_size,
            text_length=args.text_length,
            dtype=args.dtype,
            scan=scan,
        )
    )


def train_step(model: Captioner, draw: str, tx: optax.GradientTransformation):
    """The jitted step (state, batch) -> (state, metrics)."""
    settings = {"parallel_fraction": 0.75, "parallel_draw": draw}
    return make_train_step(
        mean_over_rows(functools.partial(captioning_loss, model, **settings)), tx
    )


def gflops(args: argparse.Namespace, draw: str, tx, batch) -> float:
    """Of one step, the output layer's loop over chunks of tokens counted in full."""
    model = captioner(args, scan=False)
    state = jax.eval_shape(functools.partial(init_state, model.init, tx, 0))
    lowered = jax.jit(train_step(model, draw, tx)).lower(state, batch)
    counted = (lowered.cost_analysis() or {})["flops"]
    tokens = args.batch_size * args.text_length
    head = 3 * 2 * tokens * model.config.decoder_width * pad_to_lanes(args.vocab_size)
    return (counted + head * (1 - 1 / NUM_CHUNKS)) / 1e9


def measure(step, state, batch) -> tuple[tuple[float, float], TrainState]:
    """((wall seconds, CPU-seconds), new state) of one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    return (time.perf_counter() - wall, time.process_time() - cpu), state


def main() -> None:
    """Prints one line a draw, and one that compares them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="S/16")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--decoder_depth", type=int, default=6)
    parser.add_argument("--text_length", type=int, default=64)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--optimizer", choices=("adamw", "none"), default="adamw")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    tx, _ = make_optimizer(OptimizerConfig(), 1000)
    if args.optimizer == "none":
        tx = optax.set_to_zero()
    model = captioner(args, scan=True)
    rows = synthetic_batches(
        image_size=args.image_size,
        text_length=args.text_length,
        vocab_size=args.vocab_size,
        batch_size=args.batch_size,
        seed=0,
    )
    batch = jax.tree.map(jnp.asarray, next(rows))
    state = jax.jit(functools.partial(init_state, model.init, tx, 0))()
    steps = {draw: train_step(model, draw, tx) for draw in DRAWS}
    for step in steps.values():  # compiles
        _, state = measure(step, state, batch)
    times: dict[str, list] = {draw: [] for draw in DRAWS}
    for i in range(args.rounds):
        for draw in DRAWS if i % 2 else DRAWS[::-1]:
            seconds, state = measure(steps[draw], state, batch)
            times[draw].append(seconds)
    counts = {draw: gflops(args, draw, tx, batch) for draw in DRAWS}
    for draw in DRAWS:
        wall, cpu = map(statistics.median, zip(*times[draw], strict=True))
        line = {"draw": draw, "ms": round(wall * 1e3, 1), "cpu_s": round(cpu, 3)}
        print(json.dumps(line | {"gflops": round(counts[draw], 2)}))
    pairs = [times[draw] for draw in reversed(DRAWS)]
    ratios = [[x / y for x, y in zip(*pair, strict=True)] for pair in zip(*pairs, strict=True)]
    wall, cpu = (statistics.median(ratio) for ratio in zip(*ratios, strict=True))
    comparison = {
        "ratio_ms": round(wall, 4),
        "ratio_cpu_s": round(cpu, 4),
        "flops_saved": round(1 - counts["fixed"] / counts["bernoulli"], 4),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(json.dumps(vars(args) | comparison))


if __name__ == "__main__":
    main()
