"""The largest batch that fits, from few compiles; and what to change where nothing does."""

import math
from collections.abc import Callable
from typing import NamedTuple

from capjax.errors import UserError
from capjax.training.machine import memory_limit_bytes

MAX_COMPILES = 8
CLOSE = 1.06  # a batch that does not fit over one that does, at which the search ends
_ASIDE = 1.029  # a little less than the root of CLOSE: as far from the line as is still close
_LINES = 2  # enough, one on either side, where the line is right


class Try(NamedTuple):
    """A global batch, and the bytes of one device that its step needs."""

    batch_size: int
    bytes: int


class Found(NamedTuple):
    """The largest batch tried that fits (0: none did), the least that does not, and all tries."""

    fits: int
    fails: int | None
    tries: list[Try]

    def in_words(self) -> str:
        """What is known of the largest batch, which may lie between the two."""
        if self.fails is None:
            return f"at least {self.fits:,} fits; a larger one was not tried"
        least = f"at least {self.fits:,} fits" if self.fits else "no batch that was tried fits"
        return f"{least}; {self.fails:,} does not"


def largest_batch(
    measure: Callable[[int], int],
    *,
    available: int,
    unit: int,
    first: int,
    fixed: int,
    growth: float = 8.0,
) -> Found:
    """Looks for the largest multiple of `unit` that fits into `available` bytes.

    `measure` compiles for a batch and returns the bytes it needs; `fixed` is what an empty batch
    takes. The bytes bend near the limit, where the compiler recomputes by itself in order to fit,
    so they only tell where to look next: every answer has been compiled. From `first` it grows, two
    to `growth` times a try, or shrinks, until one batch fits and another does not; then it halves
    the ratio between them. At most `MAX_COMPILES` compiles; it ends where the two are within
    `CLOSE` or one `unit`.
    """
    tries: list[Try] = []
    batch, lines = max(first // unit, 1) * unit, _LINES
    while True:
        tries.append(Try(batch, measure(batch)))
        fitting = [Try(0, fixed), *sorted(x for x in tries if x.bytes <= available)]
        fits = fitting[-1]
        fails = min((x for x in tries if x.bytes > available), default=None)
        if len(tries) == MAX_COMPILES or (fails and _is_close(fits, fails, unit)):
            return Found(fits.batch_size, fails.batch_size if fails else None, tries)
        if fails is None:
            beyond = _line(fitting[-2], fits, available) * _ASIDE
            where = min(max(beyond, 2 * fits.batch_size), growth * fits.batch_size)
        else:
            where = _between(fits, fails, available, unit, is_line=lines > 0)
            where, lines = min(where, fails.batch_size - unit), lines - 1
        batch = max(int(where) // unit * unit, fits.batch_size + unit)


def _is_close(fits: Try, fails: Try, unit: int) -> bool:
    return fails.batch_size <= max(fits.batch_size + unit, fits.batch_size * CLOSE)


def _between(fits: Try, fails: Try, available: int, unit: int, *, is_line: bool) -> float:
    """A batch beside the line's that is close to neither, if wanted and there; or halfway.

    Halfway in the ratio; a quarter of the one that fails where none is known to fit.
    """
    if fits.bytes > available:  # as the state alone does not fit, the least batch settles it
        return float(unit)
    if is_line:
        line, least = _line(fits, fails, available), max(fits.batch_size, unit)
        for batch in (line / _ASIDE, line * _ASIDE):
            if least * _ASIDE <= batch <= fails.batch_size / _ASIDE:
                return batch
    return math.sqrt((fits.batch_size or max(fails.batch_size / 16, unit)) * fails.batch_size)


def _line(start: Try, end: Try, available: int) -> float:
    """The batch at which the line through two tries meets `available`."""
    rise = (end.bytes - start.bytes) / (end.batch_size - start.batch_size)
    return start.batch_size + (available - start.bytes) / rise if rise > 0 else math.inf


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


def available_bytes() -> int | None:
    """What one device of this process may hold; None where that is not known.

    Devices of the CPU share what the process may use.
    """
    import jax  # `capjax plan --help` needs none

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        limit = memory_limit_bytes()
        return limit and limit // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def check_fits(needed: int, available: int | None) -> None:
    """Raises `UserError` where a step is given more bytes than a device has, whatever it computes.

    `available` None: it is not known, and nothing is said.
    """
    if available is not None and needed > available:
        raise UserError(
            f"parameters, optimizer and batch take {gib(needed)} of each device, which has "
            f"{gib(available)}: make the model or batch_size smaller, split more over mesh.fsdp or "
            "mesh.tensor, or take more devices (`capjax plan` counts without them)"
        )


def gib(count: float | int) -> str:
    """Bytes in words: "1.53 GiB", "12.1 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
