"""The processes of one run, on a wire of their own: they agree when to stop, and see a death.

JAX's coordination service joins them too, but tells of a process that died by ending this one under
a page of C++ frames; here the cause comes first, in one line. `meeting.meet` makes the wire. What
is sent is JSON, an object a line; an empty one only says that who sends it is alive.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Stop(NamedTuple):
    """Why a run stops before its end, and the exit status that says so."""

    reason: str
    status: int


class Peers:
    """This process and the others; every method may be called from any thread.

    A process that dies, that is silent for `heartbeat_s`, or that fails and lets the others wait,
    ends this one: `end(line, status)` is called, which prints the line and exits (tests replace
    it).
    """

    def __init__(
        self,
        process_id: int = 0,
        hosts: tuple[str, ...] = ("",),
        links: Mapping[int, socket.socket] | None = None,
        heartbeat_s: float = 30.0,
        end: Callable[[str, int], None] | None = None,
    ) -> None:
        """By default alone. `links`: those of process 0 to all others; of another, to process 0."""
        self.process_id, self.hosts = process_id, hosts
        self._links = dict(links or {})
        self._heartbeat_s, self._grace_s = heartbeat_s, heartbeat_s / 2
        self._end = end or _exit
        self._changed = threading.Condition(threading.RLock())
        self._first_step = self._step = -1  # the first and the last that `stop_before` was asked of
        self._stop: Stop | None = None  # wanted; agreed once `_until` is known
        self._held = False
        self._until: int | None = None
        self._steps: dict[int, tuple[int, bool]] = {}  # on process 0: of each, while they agree
        self._left: set[int] = set()  # those that said goodbye
        self._all_left = threading.Event()
        self._is_ending = False
        self.last_words: Callable[[], object] = lambda: None
        if self._links:
            threading.Thread(target=self._watch, daemon=True, name="capjax-peers").start()

    def stop_before(self, step: int) -> Stop | None:
        """The reason to stop now that `step` updates are done; None to go on.

        All processes ask before every step, in order, and get the same answer at the same step.
        Returns at once, but while they agree, once in a run.
        """
        with self._changed:
            while self._held:
                self._changed.wait()
            if self._first_step < 0:
                self._first_step = step
            self._step = step
            return self.stop if self._until is not None and step >= self._until else None

    def want_stop(self, stop: Stop) -> None:
        """Asks all to stop between two steps; at once where nobody has made a step."""
        if self.process_id:
            self._send(0, {"want": stop})
        else:
            self._hold(stop)

    def stop_now(self, stop: Stop, *, hangs: bool = False) -> None:
        """Ends all processes at once; `hangs`: the others call their `last_words` first."""
        self._end_all({"now": stop, "hangs": hangs}, stop.reason, stop.status)

    @property
    def stop(self) -> Stop | None:
        """Why all agreed to stop before the end; None where they did not."""
        return None if self._until is None else self._stop

    def leave(self, status: int, line: str = "") -> bool:
        """Tells the others that this process ends; False where it failed and they did not.

        They have half a heartbeat to fail as well, with their own words; then they are ended. A
        stop that was agreed upon waits for all: process 0 may be the last to finish a save, and
        what started the processes may take the first end of one for a reason to kill the others.
        """
        if not self._links:
            return True
        self._send_all({"left": status, "line": line})
        self._note_left(self.process_id)
        if status == 0:
            return True
        return self._all_left.wait(None if self.stop else self._grace_s + 2)

    # What follows runs in the threads that listen.

    def _watch(self) -> None:
        tick_s = min(1.0, self._heartbeat_s / 8)
        sent = before = time.monotonic()
        heard = dict.fromkeys(self._links, before)
        with selectors.DefaultSelector() as selector:
            for number, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, (number, bytearray()))
            while selector.get_map():
                for key, _ in selector.select(tick_s):
                    number, buffer = key.data
                    heard[number] = time.monotonic()
                    if not self._read(number, buffer):
                        selector.unregister(key.fileobj)
                        self._links[number].close()
                        del heard[number]
                        self._closed(number)
                now = time.monotonic()
                if now - before > self._heartbeat_s / 2:  # suspended, as the others may have been
                    heard = dict.fromkeys(heard, now)
                before = now
                if now - sent >= self._heartbeat_s / 4:
                    self._send_all({})
                    sent = now
                for number in heard.keys() - self._left:
                    if now - heard[number] > self._heartbeat_s:
                        self._silent(number)

    def _read(self, number: int, buffer: bytearray) -> bool:
        """Hears what has come from a process; False where nothing more will."""
        try:
            data = self._links[number].recv(1 << 16)
        except OSError:
            data = b""
        *lines, rest = bytes(buffer + data).split(b"\n")
        buffer[:] = rest
        for line in lines:
            self._heard(number, json.loads(line))
        return bool(data)

    def _heard(self, number: int, message: dict[str, Any]) -> None:
        if "want" in message:
            self._hold(Stop(*message["want"]))
        elif "hold" in message:
            self._send(0, {"at": self._held_at(Stop(*message["hold"]))})
        elif "at" in message:
            self._at(number, tuple(message["at"]))
        elif "until" in message:
            self._agreed(message["until"])
        elif "now" in message:
            if message["hangs"]:
                self.last_words()
            self.stop_now(Stop(*message["now"]), hangs=message["hangs"])
        elif "gone" in message:
            self._end_all({}, message["gone"], message["status"])
        elif "left" in message:
            self._note_left(number)
            if message["left"] and not self.stop:
                line = f"error: {self._name(number)} failed: {message['line']}"
                timer = threading.Timer(self._grace_s, self._gone, (line, message["left"]))
                timer.daemon = True
                timer.start()
        elif "all left" in message:
            self._all_left.set()

    def _closed(self, number: int) -> None:
        if number not in self._left:
            self._gone(f"error: {self._name(number)} has died; its own output says why", 1)
        elif self.process_id:
            self._all_left.set()

    def _silent(self, number: int) -> None:
        line = (
            f"error: {self._name(number)} has been silent for {self._heartbeat_s:g} s "
            "(--heartbeat_timeout): it was stopped, or its machine or the network is gone"
        )
        self._gone(line, 1)

    def _gone(self, line: str, status: int) -> None:
        self._end_all({"gone": line, "status": status}, line, status)

    def _end_all(self, message: dict[str, Any], line: str, status: int) -> None:
        """Ends this process; process 0 waits for the others, as JAX's service ends with it."""
        with self._changed:
            if self._is_ending or self._all_left.is_set():
                return
            self._is_ending = True
        if message:
            self._send_all(message)
        if self.process_id == 0:
            deadline = time.monotonic() + 2
            for link in self._links.values():
                with contextlib.suppress(OSError):
                    while (left := deadline - time.monotonic()) > 0:
                        link.settimeout(left)
                        if not link.recv(1 << 16):
                            break
        self._end(line, status)

    def _note_left(self, number: int) -> None:
        self._left.add(number)
        if self.process_id == 0 and len(self._left) == len(self.hosts):
            self._send_all({"all left": True})
            self._all_left.set()

    def _hold(self, stop: Stop) -> None:
        """On process 0: stops all before their next step, to find the last that any began."""
        with self._changed:
            if self._stop is not None:
                return
            self._steps[0] = self._held_at(stop)
            self._send_all({"hold": stop})
            self._decide()

    def _held_at(self, stop: Stop) -> tuple[int, bool]:
        """Lets this process begin no step; the last it began, and whether there is any."""
        with self._changed:
            self._stop, self._held = stop, True
            return self._step, self._step > self._first_step

    def _at(self, number: int, step: tuple[int, bool]) -> None:
        with self._changed:
            self._steps[number] = step
            self._decide()

    def _decide(self) -> None:
        if len(self._steps) < len(self.hosts):
            return
        last = max(step for step, _ in self._steps.values())
        until = last + 1 if any(begun for _, begun in self._steps.values()) else -1
        self._send_all({"until": until})
        self._agreed(until)

    def _agreed(self, until: int) -> None:
        with self._changed:
            if until >= 0:
                self._until, self._held = until, False
                self._changed.notify_all()
                return
        if self._stop is not None:
            line = f"{self._stop.reason} before the first step; run the same command again"
            self._end_all({}, line, self._stop.status)

    def _name(self, number: int) -> str:
        return f"process {number} on {self.hosts[number]}"

    def _send_all(self, message: dict[str, Any]) -> None:
        for number in self._links:
            self._send(number, message)

    def _send(self, number: int, message: dict[str, Any]) -> None:
        with self._changed, contextlib.suppress(OSError):  # a death is seen by who listens
            self._links[number].sendall(json.dumps(message).encode() + b"\n")


def _exit(line: str, status: int) -> None:
    """Prints the line, and ends this process whatever its threads wait for."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # the progress line hides it
    with contextlib.suppress(OSError, ValueError):
        print(f"{show_cursor}capjax: {line}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(status)
