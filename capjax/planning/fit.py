"""The largest batch that fits, from few compiles; and what to change where nothing does."""

import math
from collections.abc import Callable
from typing import NamedTuple

MAX_COMPILES = 6


class Try(NamedTuple):
    """A global batch, and the bytes of one device that its step needs."""

    batch_size: int
    bytes: int


def largest_batch(
    measure: Callable[[int], int], *, available: int, unit: int, first: int, fixed: int
) -> tuple[int, list[Try]]:
    """(the largest multiple of `unit` found to fit into `available` bytes, 0 if none; all tries).

    `measure` compiles for a batch and returns the bytes it needs. They are close to affine in the
    batch, so the line through two tries (through one and `fixed`, the bytes of an empty batch)
    tells where to look; every answer has been compiled. At most `MAX_COMPILES` compiles; it stops
    where a batch that fits is within a unit, or a fiftieth, of the end of the line or of one that
    does not fit.
    """
    tries: list[Try] = []
    batch = max(first // unit, 1) * unit
    fits, fails = 0, math.inf
    while True:
        tries.append(Try(batch, measure(batch)))
        if tries[-1].bytes <= available:
            fits = max(fits, batch)
        else:
            fails = min(fails, batch)
        worthwhile = max(unit, fits / 50)
        if len(tries) == MAX_COMPILES or fails - fits <= worthwhile:
            return fits, tries
        batch = _where(tries, available, fixed)
        is_far = fits < fails / 2 < math.inf
        if fits and batch < fits + worthwhile and not is_far:
            return fits, tries
        if not fits < batch < fails:  # the line leaves the bracket: it is bent
            batch = math.sqrt(max(fits, unit) * fails) if fails < math.inf else 2 * fits
        batch = int(min(max(batch // unit * unit, fits + unit), fails - unit))


def _where(tries: list[Try], available: int, fixed: int) -> float:
    """The batch at which the line meets `available`."""
    near = sorted(tries, key=lambda x: abs(x.bytes - available))[:2]
    start, end = (near[0], near[1]) if len(near) > 1 else (Try(0, fixed), near[0])
    slope = (end.bytes - start.bytes) / (end.batch_size - start.batch_size)
    return start.batch_size + (available - start.bytes) / slope if slope > 0 else 0.0


def advice(
    *,
    needed: int,
    available: int,
    state: int,
    gradients: int,
    batch_size: int,
    accumulation_steps: int,
    unit: int,
    fsdp: int,
    num_copies: int,
    remat: str,
) -> list[str]:
    """What to change in a config whose step needs more bytes of a device than are available.

    `state` and `gradients` are what a batch of nothing takes; `unit` divides every microbatch;
    `num_copies` counts the copies of the model (replica * data).
    """
    fixed = state + gradients
    lines = [f"parameters, optimizer and gradients alone: {gib(fixed)} a device at fsdp={fsdp}"]
    if num_copies > 1:
        lines[0] += f"; {gib(fixed // num_copies)} at mesh.fsdp={fsdp * num_copies}"
    if remat != "full":
        better = "dots or full" if remat == "none" else "full"
        lines.append(f"model.remat={better} keeps fewer activations (now {remat})")
    room, microbatch = available - fixed, batch_size // accumulation_steps
    each = max(needed - fixed, 1) / microbatch
    largest = int(room / each) // unit * unit
    if room <= 0:
        return [*lines, "no batch fits: take more chips, split over mesh.tensor, a smaller model"]
    lines.append(f"activations: about {each / 2**20:.3g} MiB a device for an image of the batch")
    if largest < unit:
        return lines
    lines.append(f"batch_size={largest * accumulation_steps} may fit (--search makes sure)")
    steps = accumulation_steps
    while batch_size // steps > largest and batch_size % (2 * steps * unit) == 0:
        steps *= 2
    if batch_size // steps <= largest:
        lines.append(f"accumulation_steps={steps} keeps batch_size={batch_size}")
    return lines


def gib(count: float | int) -> str:
    """Bytes in words: "1.53 GiB", "12.1 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
