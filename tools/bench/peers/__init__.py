"""One training step of a captioner, by capjax and by others, on the same batch.

Each module has `prepare(job) -> Step`, and imports its framework when it is imported itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Job(NamedTuple):
    """What is trained: CapPa's dimensions, AdamW, clipping at 1; the text is all real tokens."""

    size: str = "S/16"
    decoder_depth: int = 6
    image_size: int = 128
    batch_size: int = 32
    text_length: int = 32
    vocab_size: int = 32_000
    dtype: str = "float32"  # of the products; parameters and updates are float32
    variant: str = ""  # flags joined by "+"; the module's docstring names them


class Step(NamedTuple):
    """A compiled training step on a batch that is already on the device."""

    run: Callable[[], float]  # one step; waits for it and returns the loss before the update
    gemm: Callable[[], object]  # some square matrix products of the job's type; waits for them
    gemm_flops: float  # in one call of `gemm`
    facts: dict[str, Any]  # such as versions, the device, bytes


LEARNING_RATE, WEIGHT_DECAY, B2 = 1e-3, 1e-4, 0.95
PARALLEL_FRACTION = 0.75
NUM_PRODUCTS = 4


def prepare(entry: str, job: Job) -> Step:
    """The step of `entry`: a module of this package and, behind a colon, its variant."""
    name, _, variant = entry.partition(":")
    job = job._replace(variant=variant)
    if name == "ours":
        from peers import ours as module
    elif name == "big_vision":
        from peers import big_vision as module
    elif name == "hugging_face":
        from peers import hugging_face as module
    else:
        raise SystemExit(f"no peer {entry!r}: expected ours, big_vision or hugging_face")
    return module.prepare(job)


def described(job: Job) -> dict[str, Any]:
    """The job without its variant, which the entry tells."""
    return {name: value for name, value in job._asdict().items() if name != "variant"}


def is_jax(entry: str) -> bool:
    """Whether the entry's framework is JAX, so that several fit in one process."""
    return not entry.startswith("hugging_face")


def gemm_size(platform: str) -> int:
    """Rows of a square product that is large enough for that platform."""
    return 2048 if platform == "cpu" else 8192
