"""capjax's step, on one device.

Variants: "unrolled" (default: scan over layers); "fixed", the fixed number of parallel rows
(default: independent draws, as in big_vision); "full" or "dots", a remat policy; "xla" or "cudnn",
an implementation of attention (default: what capjax chooses).
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capjax.mesh import MeshShape, make_mesh, place_batch
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.presets import variant
from capjax.objectives.captioning import captioning_loss
from capjax.objectives.objective import mean_over_rows
from capjax.training.optimizer import OptimizerConfig, make_optimizer
from capjax.training.state import init_state
from capjax.training.step import make_train_step
from peers import (
    B2,
    LEARNING_RATE,
    NUM_PRODUCTS,
    PARALLEL_FRACTION,
    WEIGHT_DECAY,
    Job,
    Step,
    gemm_size,
)

OPTIMIZER = OptimizerConfig(
    learning_rate=LEARNING_RATE,
    weight_decay=WEIGHT_DECAY,
    b2=B2,
    grad_clip_norm=1.0,
    schedule="constant",
)


def captioner(job: Job) -> Captioner:
    """CapPa of the job's sizes."""
    flags = job.variant.split("+")
    return Captioner(
        CaptionerConfig(
            **variant(job.size),
            image_size=job.image_size,
            decoder_depth=job.decoder_depth,
            vocab_size=job.vocab_size,
            text_length=job.text_length,
            dtype=job.dtype,
            scan="unrolled" not in flags,
            remat=next((flag for flag in flags if flag in ("full", "dots")), "none"),
            attention=next((flag for flag in flags if flag in ("xla", "cudnn")), "auto"),
        )
    )


def batch_of(job: Job) -> dict[str, np.ndarray]:
    """Random images and captions without padding."""
    rng = np.random.default_rng(0)
    B, size = job.batch_size, job.image_size
    return {
        "image": rng.integers(0, 256, (B, size, size, 3), dtype=np.uint8),
        "tokens": rng.integers(1, job.vocab_size, (B, job.text_length), dtype=np.int32),
        "position": np.arange(B, dtype=np.int32),
    }


def build(job: Job) -> tuple[Captioner, Callable[[], Any], Any, dict[str, Any]]:
    """(model, what makes the initial state, jitted step, batch), for use within the mesh."""
    model = captioner(job)
    tx, schedule = make_optimizer(OPTIMIZER, 1_000_000)
    settings = {
        "parallel_fraction": PARALLEL_FRACTION,
        "parallel_draw": "fixed" if "fixed" in job.variant.split("+") else "bernoulli",
    }
    loss = functools.partial(captioning_loss, model, **settings)
    step = make_train_step(mean_over_rows(loss), tx, learning_rate=schedule)
    start = jax.jit(functools.partial(init_state, model.init, tx, 0))
    return model, start, step, batch_of(job)


def gemm_of(dtype: str):
    """(some square products of that type, which are waited for; their FLOPs)."""
    size = gemm_size(jax.default_backend())
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.dtype(dtype))
    multiply = jax.jit(jnp.matmul)

    def products() -> None:
        jax.block_until_ready([multiply(a, b) for _ in range(NUM_PRODUCTS)])

    return products, NUM_PRODUCTS * 2.0 * size**3


def compiled_facts(compiled: Any, params: Any, compile_s: float) -> dict[str, Any]:
    """What is told of a step of JAX; `compile_s` holds tracing and lowering too."""
    memory = compiled.memory_analysis()
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "compile_s": round(compile_s, 2),
        "temp_mb": round(memory.temp_size_in_bytes / 1e6) if memory else None,
        "params_m": round(sum(x.size for x in jax.tree.leaves(params)) / 1e6, 2),
    }


def prepare(job: Job) -> Step:
    """See the module."""
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    jax.set_mesh(mesh)
    model, start, step, rows = build(job)
    state = start()
    batch = place_batch(mesh, rows)
    begin = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    facts = compiled_facts(compiled, state.params, time.perf_counter() - begin)
    box = [state]

    def run() -> float:
        box[0], metrics = compiled(box[0], batch)
        return float(metrics["loss"])

    return Step(run, *gemm_of(job.dtype), facts | {"params_m": round(model.num_params() / 1e6, 2)})
