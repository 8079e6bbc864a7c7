"""Timing on machines that other work may share: wall time and CPU-seconds of each call."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Timing(NamedTuple):
    """Of one call, or the medians over calls; `cpu_s` is of all threads of this process."""

    wall_s: float
    cpu_s: float


def timed(call: Callable[[], object]) -> Timing:
    """Runs `call`, which must wait for what it computes."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def medians(timings: Sequence[Timing]) -> Timing:
    """The median of each."""
    return Timing(*(statistics.median(column) for column in zip(*timings, strict=True)))


def alternate(
    calls: dict[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, Timing]:
    """Medians by name, the calls taking turns, so that a disturbance falls on all of them."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    timings: dict[str, list[Timing]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            timings[name].append(timed(call))
    return {name: medians(found) for name, found in timings.items()}
