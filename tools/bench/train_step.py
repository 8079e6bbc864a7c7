"""The training step on synthetic batches: images/s, FLOP/s, and its share of the chip's peak.

    python tools/bench/train_step.py --size=L/14 --batch_size=128 --dtype=bfloat16

Prints one JSON line a remat policy: the median of the steps after the first, model FLOPs as
`Captioner.flops_per_example` counts them, MFU against the data sheet's peak where the device is
known, and the rate of one large matrix product of the same type measured in the same process.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp

from capjax.data.pipeline import synthetic_batches
from capjax.mesh import MeshShape, make_mesh, place_batch
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.objectives.captioning import captioning_loss
from capjax.objectives.objective import mean_over_rows
from capjax.training.optimizer import OptimizerConfig, make_optimizer
from capjax.training.progress import peak_flops
from capjax.training.state import init_state
from capjax.training.step import make_train_step

SIZES = {  # width, depth, heads, MLP, decoder blocks
    "S/16": (384, 12, 6, 1536, 6),
    "B/16": (768, 12, 12, 3072, 6),
    "L/14": (1024, 24, 16, 4096, 12),
}


def captioner(args: argparse.Namespace, remat: str) -> Captioner:
    """CapPa of the asked size, 32,000 pieces, 64 tokens."""
    width, depth, num_heads, mlp_dim, decoder_depth = SIZES[args.size]
    return Captioner(
        CaptionerConfig(
            image_size=args.image_size,
            patch_size=int(args.size.split("/")[1]),
            width=width,
            depth=depth,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            decoder_depth=decoder_depth,
            vocab_size=32_000,
            text_length=64,
            dtype=args.dtype,
            remat=remat,
        )
    )


def gemm_flops(dtype: str, size: int) -> float:
    """FLOP/s of a square matrix product, the median of ten."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(a, b).block_until_ready()
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        multiply(a, b).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(times)


def measure(args: argparse.Namespace, remat: str) -> dict[str, object]:
    """Compiles and times the step."""
    mesh = make_mesh(MeshShape())
    model = captioner(args, remat)
    tx, schedule = make_optimizer(OptimizerConfig(), 1000)
    loss = functools.partial(captioning_loss, model, parallel_fraction=0.75)
    step = make_train_step(mean_over_rows(loss), tx, learning_rate=schedule)
    with jax.set_mesh(mesh):
        state = jax.jit(functools.partial(init_state, model.init, tx, 0))()
        rows = synthetic_batches(
            image_size=args.image_size,
            text_length=64,
            vocab_size=32_000,
            batch_size=args.batch_size,
            seed=0,
        )
        batch = place_batch(mesh, next(rows))
        begin = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        compile_s = time.perf_counter() - begin
        times = []
        for _ in range(args.steps):
            begin = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - begin)
    seconds = statistics.median(times)
    flops = model.flops_per_example() * args.batch_size / seconds
    peak = peak_flops(jax.devices())
    return {
        "size": args.size,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "remat": remat,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "step_ms": round(seconds * 1e3, 2),
        "images_per_s": round(args.batch_size / seconds, 1),
        "tflops_per_s": round(flops / 1e12, 2),
        "mfu": round(flops / peak, 4) if peak else None,
        "share_of_gemm": round(flops / gemm_flops(args.dtype, args.gemm_size), 4),
        "compile_s": round(compile_s, 1),
    }


def main() -> None:
    """Prints one line a policy."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="S/16")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", default="none", help="policies, separated by commas")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--gemm_size", type=int, default=4096)
    args = parser.parse_args()
    for remat in args.remat.split(","):
        print(json.dumps(measure(args, remat)), flush=True)


if __name__ == "__main__":
    main()
