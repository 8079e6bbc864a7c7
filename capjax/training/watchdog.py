"""Ends a process in which nothing moves any more, after it has said where it stands still.

A collective that one process never joins, a read that never returns, a lock that nobody lets go:
such a run would keep its machines for ever. Every process has a watchdog of its own, so all of them
say where they are.
"""

import contextlib
import datetime
import faulthandler
import functools
import os
import threading
import time
from typing import NoReturn

from capjax.training.peers import Peers, Stop
from capjax.training.phases import Phases

REQUEUE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command again may well succeed
_GRACE_S = 3.0  # for the other processes to say where they are, too: then this one ends all
_END_S = 5.0  # for all to end, before this one does so by itself
_WORDS = {
    "init": "starting",
    "compile": "compiling the training step",
    "data": "waiting for a batch",
    "step": "waiting for a training step",
    "evaluation": "evaluating",
    "save": "saving",
}


class Watchdog:
    """Watches from a thread while it is entered; see `Phases` for what counts as moving.

    Args:
      limit_s: between two steps; 0: no limit.
      slow_limit_s: at what takes longer: starting, compiling, one evaluation, one save; 0: none.
      file: the stacks of all threads are added to it, beside standard error; None: there alone.
      peers: the processes that end with this one.

    A process that was stopped (SIGSTOP, a suspended job) does not age meanwhile. Code that hangs
    and holds Python's interpreter lock stops the watchdog as well.
    """

    def __init__(
        self,
        phases: Phases,
        limit_s: float,
        slow_limit_s: float,
        file: str | os.PathLike | None,
        peers: Peers | None = None,
    ) -> None:
        self._phases, self._file, self._peers = phases, file, peers or Peers()
        self._limits = {
            phase: limit_s if phase in ("data", "step") else slow_limit_s for phase in _WORDS
        }
        self._peers.last_words = self._speak
        self._has_spoken, self._still_s = False, 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if any(self._limits.values()):
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        tick_s = min(1.0, *(limit / 10 for limit in self._limits.values() if limit))
        seen, before = self._phases.moves, time.monotonic()
        while not self._is_over.wait(tick_s):
            now = time.monotonic()
            self._still_s += min(now - before, 2 * tick_s)  # a stopped process does not age
            before = now
            if self._phases.moves != seen:
                seen, self._still_s = self._phases.moves, 0.0
            limit = self._limits[self._phases.phase]
            if limit and self._still_s >= limit:
                self._end()

    def _speak(self) -> None:
        """Says, once, where all threads are. Waits for no lock that a hanging one may hold."""
        if self._has_spoken:
            return
        self._has_spoken = True
        phases = self._phases
        field = "watchdog_s" if phases.phase in ("data", "step") else "watchdog_slow_s"
        words = (
            f"process {self._peers.process_id} stood still for {self._still_s:.0f} s after step "
            f"{phases.step}, {_WORDS[phases.phase]} (health.{field}); the stacks of its threads:\n"
        )
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        _say(2, words)
        with contextlib.suppress(OSError):
            if self._file is not None:
                out = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                _say(out, f"{when}: {words}")

    def _end(self) -> NoReturn:
        """Says it and ends all."""
        self._speak()
        phases = self._phases
        where = "above" if self._file is None else f"in {self._file}"
        line = (
            f"error: nothing moved for {self._still_s:.0f} s, {_WORDS[phases.phase]} after step "
            f"{phases.step}; where each thread stood is {where}; the same command goes on from "
            "the last checkpoint"
        )
        if len(self._peers.hosts) > 1:
            time.sleep(_GRACE_S)
        # In a thread, as what it takes may be what another one hangs with.
        stop = Stop(line, REQUEUE_STATUS)
        end = functools.partial(self._peers.stop_now, stop, hangs=True)
        threading.Thread(target=end, daemon=True).start()
        time.sleep(_END_S)
        os._exit(REQUEUE_STATUS)


def _say(out: int, words: str) -> None:
    _write(out, words)
    with contextlib.suppress(OSError):
        faulthandler.dump_traceback(out, all_threads=True)


def _write(out: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(out, text.encode())
