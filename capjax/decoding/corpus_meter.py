"""How a long captioning job is doing: captions a second, time left, waiting, and what it costs."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from capjax.decoding.corpus import count_records
from capjax.training.progress import duration

T = TypeVar("T")
_EVERY_S = 0.25  # a new line at most so often


class Meter:
    """Counts records and the time spent waiting, from the second batch on: the first compiles.

    Waiting on input is the time in which the next image was not there when it was asked for (the
    device may still have been busy); on output, the time in which records could not be handed on.

    Args:
      total: images of the whole corpus, by which the cost is told.
      mine: those that are to be made now.
      batch_size: how many come at once.
      price_per_hour: of this process's machine, in any currency.
      show: takes the line, now and then.
    """

    def __init__(
        self,
        total: int,
        mine: int,
        batch_size: int,
        *,
        price_per_hour: float | None = None,
        show: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.mine = total, mine
        self.counts, self.first_error = count_records(()), ""
        self._batch_size, self._price = batch_size, price_per_hour
        self._show, self._clock = show, clock
        self._waited = {"input": 0.0, "output": 0.0}
        self._begin: float | None = None
        self._shown = clock()

    def reading(self, rows: Iterable[T]) -> Iterator[T]:
        """The rows; the time until each comes is waiting on input."""
        rows = iter(rows)
        while True:
            with self.waiting("input"):
                try:
                    row = next(rows)
                except StopIteration:
                    return
            yield row

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Counts the time inside as waiting on "input" or "output"."""
        begin = self._clock()
        yield
        self._waited[what] += self._clock() - begin

    def made(self, record: dict[str, Any]) -> None:
        """Counts a record."""
        now = self._clock()
        if self._begin is None:
            self._begin = self._shown = now
            self._waited = dict.fromkeys(self._waited, 0.0)
        for name, number in count_records([record]).items():
            self.counts[name] += number
        if "error" in record and not self.first_error:
            self.first_error = f"{record['key']}: {record['error']}"
        if now - self._shown >= _EVERY_S and self._done > self._batch_size:
            self._shown = now
            self._show(self.line())

    @property
    def _done(self) -> int:
        return self.counts["records"]

    def rate(self) -> float | None:
        """Images a second after the first batch; None before the second is done."""
        if self._begin is None or self._done <= self._batch_size:
            return None
        return (self._done - self._batch_size) / max(self._clock() - self._begin, 1e-9)

    def line(self) -> str:
        """`320/1000 images  52.1 captions/s  left 0:13  waiting: input 0.2%, output 0.0%`."""
        parts = [f"{self._done}/{self.mine} images"]
        if rate := self.rate():
            parts += [f"{rate:.4g} captions/s", f"left {duration((self.mine - self._done) / rate)}"]
            parts += [self._waiting(), *self._cost(rate)]
        return "  ".join(parts)

    def summary(self) -> str | None:
        """What the whole of it was like; None where it was over with the first batch."""
        if not (rate := self.rate()):
            return None
        return "  ".join([f"{rate:.4g} captions/s", self._waiting(), *self._cost(rate)])

    def _waiting(self) -> str:
        passed = max(self._clock() - (self._begin or 0.0), 1e-9)
        shares = [f"{what} {waited / passed:.1%}" for what, waited in self._waited.items()]
        return f"waiting: {', '.join(shares)}"

    def _cost(self, rate: float) -> list[str]:
        if self._price is None:
            return []
        cost = self.total / rate / 3600 * self._price
        return [f"cost of all {self.total} images: {cost:.4g}"]
