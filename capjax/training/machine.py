"""What the host of a process runs short of: memory, and batches made in time."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import SupportsFloat

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_AGAIN_S = 600.0  # an alarm that goes on is said so often
_WINDOW_S = 60.0  # over which waiting is judged: the first batches of a run are always waited for


def memory_limit_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """What this process may use: the machine's memory, or less where its cgroup has less.

    None elsewhere than on Linux.
    """
    limits = []
    with contextlib.suppress(OSError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                limits.append(int(line.split()[1]) * 1024)
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":  # version 2
                limits += _limits(cgroups, path, "memory.max")
            elif "memory" in controllers.split(","):
                limits += _limits(cgroups / "memory", path, "memory.limit_in_bytes")
    return min(limits, default=None)


def _limits(root: Path, path: str, name: str) -> Iterator[int]:
    """Of a cgroup and those around it; within a container its own may lie at the root."""
    place = root / path.lstrip("/")
    for directory in (place, *place.parents):
        if directory.is_relative_to(root):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                yield int((directory / name).read_text())


def held_bytes(proc: Path = _PROC) -> int:
    """Memory of this process and its children that no other file holds; 0 where it is not known."""
    return sum(_own_bytes(proc, pid) for pid in ("self", *_children(proc, "self")))


def _children(proc: Path, pid: str) -> Iterator[str]:
    for path in (proc / pid / "task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in path.read_text().split():
                yield child
                yield from _children(proc, child)


def _own_bytes(proc: Path, pid: str) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for line in (proc / pid / "status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) * 1024
    return total


class MachineAlarms:
    """A writer of metrics that says what the host runs short of, in one line, now and then.

    Args:
      memory_share: of the memory that this process and its workers may hold; 0: not watched.
      data_wait_share: of the time of recent steps spent waiting for data; 0: not watched.
      say: gets the lines.
    """

    def __init__(
        self,
        memory_share: float,
        data_wait_share: float,
        say: Callable[[str], None],
        *,
        held: Callable[[], int] = held_bytes,
        limit: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory_share, self._data_wait_share = memory_share, data_wait_share
        self._say, self._held, self._clock = say, held, clock
        self._limit = memory_limit_bytes() if limit is None else limit
        self._waits: list[float] = []
        self._began = clock()
        self._said_at: dict[str, float] = {}

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Looks at the metrics of a training step, and at the memory of the moment."""
        if "train/loss" not in values:
            return
        if self._memory_share and self._limit:
            share = self._held() / self._limit
            if share > self._memory_share:
                self._alarm(
                    "memory",
                    f"step {step}: this process and its workers hold {share:.0%} of "
                    f"{self._limit / 1e9:.1f} GB of memory (health.memory_share="
                    f"{self._memory_share:g}); lower reading.cache_megabytes, reading.prefetch or "
                    "reading.num_workers before the system ends the run",
                )
        if self._data_wait_share and "train/data_wait" in values:
            self._waits.append(float(values["train/data_wait"]))
            if self._clock() - self._began >= _WINDOW_S:
                self._judge_waiting(step)

    def _judge_waiting(self, step: int) -> None:
        share = sum(self._waits) / len(self._waits)
        self._waits, self._began = [], self._clock()
        if share > self._data_wait_share:
            self._alarm(
                "data",
                f"step {step}: {share:.0%} of the time goes into waiting for data "
                f"(health.data_wait_share={self._data_wait_share:g}); raise reading.num_threads or "
                "reading.num_workers, or make the images small once with `capjax data prepare`",
            )

    def _alarm(self, kind: str, line: str) -> None:
        now = self._clock()
        if now - self._said_at.get(kind, -_AGAIN_S) >= _AGAIN_S:
            self._said_at[kind] = now
            self._say(line)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""
