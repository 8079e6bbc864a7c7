"""What the main thread of a training process is at: at any moment one of a few phases."""

import contextlib
import time
from collections.abc import Callable, Iterator

# `init`: all before the first batch is asked for; `compile`: waiting for the compiled step;
# `data`: waiting for a batch; `step`: all else between evaluations and saves.
PHASES = ("init", "compile", "data", "step", "evaluation", "save")


class Phases:
    """The time of each phase, and whether anything moves.

    Attributes:
      phase: the one under way.
      moves: grows whenever a phase begins or ends; other threads may look.
      step: the last whose metrics were read.
      after_step: called after each.
    """

    def __init__(self, init_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        """`init_s`: what the process spent before this is made."""
        self._clock, self._since = clock, clock() - init_s
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self.phase, self.moves, self.step = "init", 0, 0
        self.after_step: Callable[[], None] = lambda: None

    def enter(self, phase: str) -> str:
        """Begins a phase; returns the one that it ends."""
        now = self._clock()
        self._seconds[self.phase] += now - self._since
        before, self.phase, self._since = self.phase, phase, now
        self.moves += 1
        return before

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase within another, which goes on after it."""
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def finished(self, step: int) -> None:
        """Notes that the metrics of `step` were read."""
        self.step = step
        self.after_step()

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds so far; together all since the beginning."""
        seconds = dict(self._seconds)
        seconds[self.phase] += self._clock() - self._since
        return seconds
