"""How the run is doing: throughput, the progress line, and what the machine can do at best."""

import collections
import contextlib
import os
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text

from capjax.chips import chip_of

_IMPORTED_AT = time.monotonic()


def peak_flops(devices: Collection[Any]) -> float | None:
    """Peak bf16 FLOP/s of all `devices` together; None where one is unknown (a CPU is).

    A TPU chip may show as two devices (v4 unfused, 7x); its cores share coordinates.
    """
    peaks = {}
    for device in devices:
        chip = chip_of(device.device_kind)
        if chip is None:
            return None
        coords = getattr(device, "coords", None)
        place = device.id if coords is None else (getattr(device, "slice_index", 0), tuple(coords))
        peaks[place] = chip.peak_flops
    return sum(peaks.values()) or None


class Rates(NamedTuple):
    """Averages over some steps, evaluation and saves left out of all but `wall_per_step_s`."""

    images_per_s: float
    data_wait: float  # fraction of the time spent waiting for data
    wall_per_step_s: float


class _Mark(NamedTuple):
    step: int
    wall_s: float
    training_s: float
    waited_s: float


class Throughput:
    """Splits time into training, waiting for data (a part of training), and standing still."""

    def __init__(self, batch_size: int, clock: Callable[[], float] = time.monotonic, window=32):
        self._batch_size, self._clock = batch_size, clock
        self._begin = clock()
        self._waited_s = self._paused_s = 0.0
        self._first: _Mark | None = None
        self._marks: collections.deque[_Mark] = collections.deque(maxlen=window + 1)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        begin = self._clock()
        yield
        self._waited_s += self._clock() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside (evaluation, saves) out of training."""
        begin = self._clock()
        yield
        self._paused_s += self._clock() - begin

    def finished(self, step: int) -> None:
        """Notes that the device has finished `step`. Rates count from the first one, so they
        leave compilation out.
        """
        now = self._clock()
        mark = _Mark(step, now, now - self._paused_s, self._waited_s)
        self._first = self._first or mark
        self._marks.append(mark)

    def recent(self) -> Rates | None:
        """Rates over the last steps; None before the second."""
        return self._rates(self._marks[0]) if self._marks else None

    def overall(self) -> Rates | None:
        """Rates over all steps but the first; None before the second."""
        return self._rates(self._first) if self._first else None

    def training_s(self) -> float:
        """Seconds so far without evaluation and saves, compilation included."""
        return self._clock() - self._begin - self._paused_s

    def data_wait(self) -> float:
        """Fraction of `training_s` spent waiting for data, the first batch included."""
        return self._waited_s / max(self.training_s(), 1e-9)

    def _rates(self, begin: _Mark) -> Rates | None:
        end = self._marks[-1]
        steps, training_s = end.step - begin.step, max(end.training_s - begin.training_s, 1e-9)
        if steps == 0:
            return None
        return Rates(
            images_per_s=steps * self._batch_size / training_s,
            data_wait=(end.waited_s - begin.waited_s) / training_s,
            wall_per_step_s=(end.wall_s - begin.wall_s) / steps,
        )


def progress_line(
    step: int,
    total_steps: int,
    loss: float,
    rates: Rates | None = None,
    *,
    flops_per_image: float = 0.0,
    peak: float | None = None,
    rss_bytes: int = 0,
) -> str:
    """The one line: step, loss, images/s, data-wait, time left, model FLOP/s, MFU, peak memory.

    `flops_per_image` is of the model, forward and backward; `peak` (FLOP/s) is of all devices.
    """
    parts = [f"step {step}/{total_steps}", f"loss {loss:.4f}"]
    if rates is not None:
        parts += [f"{rates.images_per_s:.4g} images/s", f"data-wait {rates.data_wait:.1%}"]
        parts += [f"left {duration(rates.wall_per_step_s * (total_steps - step))}"]
        flops = flops_per_image * rates.images_per_s
        if flops:
            parts += [f"{flops / 1e9:,.1f} GFLOP/s"]
        if flops and peak:
            parts += [f"MFU {flops / peak:.1%}"]
    if rss_bytes:
        parts += [f"memory {rss_bytes / 1e9:.2f} GB"]
    return "  ".join(parts)


def duration(seconds: float | int) -> str:
    """Seconds as `m:ss`, `h:mm:ss` or `2d 3:04:05`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    clock = f"{h}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
    return f"{days}d {clock}" if days else clock


class Progress:
    """Shows the run to a person: one line kept up to date on a terminal, else a line now and then.

    Silent unless `is_shown` (default: on the first process). Use as a context manager.
    """

    def __init__(
        self,
        stream: Any = None,  # a text file; standard error
        *,
        is_shown: bool | None = None,
        plain_every_s: float = 10.0,
    ):
        self._stream = stream or sys.stderr
        self._is_shown = jax.process_index() == 0 if is_shown is None else is_shown
        self._plain_every_s = plain_every_s
        self._printed_at = float("-inf")
        self._line = ""
        self._doing: tuple[str, float] | None = None
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        console = Console(file=self._stream)
        if self._is_shown and console.is_terminal:
            self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> Text:
        doing = self._doing
        line = f"{doing[0]}... {time.monotonic() - doing[1]:.1f} s" if doing else self._line
        return Text(line, no_wrap=True, overflow="ellipsis")

    def show(self, line: str, *, always: bool = False) -> None:
        """Shows the newest progress line; where lines pile up, only when due or `always`."""
        self._line = line
        now = time.monotonic()
        if self._live is None and (always or now - self._printed_at >= self._plain_every_s):
            self._printed_at = now
            self.say(line)

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self._live is not None:
            self._live.console.print(Text(text))
        elif self._is_shown:
            print(text, file=self._stream, flush=True)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Announces something that takes a while, then how long it took."""
        begin = time.monotonic()
        self._doing = (what, begin)
        if self._live is None:
            self.say(f"{what}...")
        try:
            yield
        finally:
            self._doing = None
        self.say(f"{what}... {time.monotonic() - begin:.1f} s")


def peak_rss_bytes() -> int:
    """The most memory this process has held at once; worker processes not counted."""
    with contextlib.suppress(OSError):
        # Not getrusage: on Linux a new process starts with the peak of the one that started it.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_age_s() -> float:
    """Seconds since this process started (elsewhere than on Linux: since this file's import)."""
    with contextlib.suppress(OSError, AttributeError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    return time.monotonic() - _IMPORTED_AT
