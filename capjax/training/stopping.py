"""Signals that ask a run to stop: between two steps, the same in every process, all of it kept.

SIGTERM comes from clouds and schedulers, SIGUSR1 from Slurm's `--signal`, SIGINT from ^C. Preempted
TPU machines send SIGTERM too. The first asks; the same again, more than a second later, ends all
processes at once.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from capjax.errors import RunAgain
from capjax.training.loop import Stopped
from capjax.training.peers import Peers, Stop

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_TWICE_S = 1.0  # launchers may pass on what came from elsewhere already


def stop_for(number: int) -> Stop:
    """What a signal asks for: to be run again (75, EX_TEMPFAIL), or to end (130, of ^C)."""
    status = 130 if number == signal.SIGINT else RunAgain.status
    return Stop(f"stopped by {signal.Signals(number).name}", status)


class StopSignals:
    """A context within which the signals ask `peers` to stop; of a process's main thread.

    They are heard by a thread of their own, whatever the main thread waits for. The loop's
    `Stopped` leaves it as `RunAgain`, where the signals were the reason.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._heard: dict[int, float] = {}

    def __enter__(self) -> "StopSignals":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = {n: signal.signal(n, lambda number, frame: None) for n in SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True, name="capjax-signals")
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)
        if isinstance(error, Stopped) and (stop := self._peers.stop):
            line = f"{error}, which is saved; the same command goes on from there"
            raise RunAgain(line, stop.status) from error

    def _listen(self) -> None:
        while data := os.read(self._read, 64):
            for number in data:
                if number in SIGNALS:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        first, stop = self._heard.setdefault(number, now), stop_for(number)
        if first == now:
            self._peers.want_stop(stop)
        elif now - first > _TWICE_S:
            self._peers.stop_now(Stop(f"{stop.reason}, twice: ended at once", stop.status))


@contextlib.contextmanager
def end_cleanly() -> Iterator[None]:
    """Within it the first of the signals ends the work as an error would: what is open is closed.

    For commands whose work goes on by running them again, or is lost in any case.
    """

    def end(number: int, frame: object) -> NoReturn:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # the second ends it at once
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise RunAgain(f"{stop_for(number).reason}; run the same command again")

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
