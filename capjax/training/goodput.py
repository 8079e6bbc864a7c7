"""Where the wall time of a run went, over all its restarts: `launches.jsonl` of a workdir.

A launch is a process (of several the first) from its start to its end, or from one rollback to the
next. It adds a line with the seconds of its phases so far at every save, and besides whenever half
a percent of its age has passed since the last: so a kill takes no more than that share from the
account. Seconds are sorted into useful and lost ones by the steps from which later launches began:
what a launch did beyond them was done again.
"""

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from capjax.training.phases import PHASES, Phases
from capjax.training.progress import process_age_s
from capjax.training.storage import exists, is_remote, read_bytes

FILE = "launches.jsonl"
LOST = "lost"
_REPEATED = ("data", "step", "evaluation", "save")  # what is done again from an earlier step
_EVERY_SHARE, _EVERY_S, _REMOTE_EVERY_S = 0.005, 1.0, 30.0


class Account(NamedTuple):
    """A launch up to some moment. `began` is in Unix seconds, `step` the last one finished."""

    launch: int
    start_step: int
    began: float
    step: int
    seconds: dict[str, float]

    @property
    def end(self) -> float:
        """The moment, in Unix seconds."""
        return self.began + sum(self.seconds.values())


class TimeSpent(NamedTuple):
    """Seconds of each phase, and lost ones; `idle_s`: between launches, which are apart.

    What a killed launch did after its last line counts as idle: it is not known.
    """

    seconds: dict[str, float]
    idle_s: float
    launches: int

    @property
    def total_s(self) -> float:
        """All but the idle ones."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of training steps that were not lost."""
        return self.seconds["step"] / max(self.total_s, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """For a summary, as JSON."""
        return {"goodput": self.goodput, "total_s": self.total_s, **self._asdict()}


def time_spent(accounts: Sequence[Account], next_step: int | float = math.inf) -> TimeSpent:
    """Sums up the launches; `next_step` is that from which one more goes on."""
    launches: dict[int, list[Account]] = {}
    for account in accounts:
        launches.setdefault(account.launch, []).append(account)
    seconds, idle_s, began = dict.fromkeys((*PHASES, LOST), 0.0), 0.0, math.inf
    for of_launch in reversed(launches.values()):
        last = of_launch[-1]
        idle_s += max(0.0, began - last.end) if math.isfinite(began) else 0.0
        before = [account.seconds for account in of_launch if account.step <= next_step]
        useful: Mapping[str, float] = before[-1] if before else {}  # none: it was undone as a whole
        for phase, value in last.seconds.items():
            kept = useful.get(phase, 0.0) if phase in _REPEATED else value
            seconds[phase] += kept
            seconds[LOST] += value - kept
        began, next_step = last.began, min(next_step, last.start_step)
    return TimeSpent(seconds, idle_s, len(launches))


def read_accounts(path: epath.PathLike) -> list[Account]:
    """The lines of the file, without torn ones; none where there is no such file."""
    path = epath.Path(path)
    found = []
    for line in read_bytes(path).split(b"\n") if exists(path) else ():
        with contextlib.suppress(ValueError, TypeError):  # torn: not JSON, or not all of it
            account = Account(**json.loads(line))
            if set(account.seconds) == set(PHASES):
                found.append(account)
    return found


def unaccounted_s(root: epath.PathLike) -> float:
    """Seconds of this process that no launch has accounted for, as after a rollback."""
    accounts = read_accounts(epath.Path(root) / FILE)
    since_last = time.time() - accounts[-1].end if accounts else math.inf
    return min(process_age_s(), max(since_last, 0.0))


class LaunchLog:
    """The account of this launch, which goes on from `start_step`; `root` None: kept nowhere."""

    def __init__(self, root: epath.PathLike | None, phases: Phases, start_step: int) -> None:
        self._path = None if root is None else epath.Path(root) / FILE
        accounts = read_accounts(self._path) if self._path else []
        self._before = time_spent(accounts, start_step)
        self._launch = 1 + max((account.launch for account in accounts), default=0)
        self._phases, self._start_step, self._kept_s = phases, start_step, 0.0
        self._began = time.time() - sum(phases.seconds().values())
        self._idle_s = max(0.0, self._began - accounts[-1].end) if accounts else 0.0
        self._data = read_bytes(self._path) if self._path and exists(self._path) else b""
        if self._data and not self._data.endswith(b"\n"):
            self._write(b"\n")  # after a torn line
        phases.step, phases.after_step = start_step, self.keep_if_due
        self.keep()

    def keep(self) -> None:
        """Adds a line. A disk that cannot take it ends nothing."""
        account = self._account()
        self._kept_s = account.end - account.began
        rounded = {phase: round(value, 3) for phase, value in account.seconds.items()}
        self._write(json.dumps(account._replace(seconds=rounded)._asdict()).encode() + b"\n")

    def keep_if_due(self) -> None:
        """Adds a line where the last is too long ago."""
        age_s = sum(self._phases.seconds().values())
        least_s = _REMOTE_EVERY_S if self._path and is_remote(self._path) else _EVERY_S
        if age_s - self._kept_s >= max(least_s, _EVERY_SHARE * age_s):
            self.keep()

    def spent(self) -> TimeSpent:
        """Of the whole run so far."""
        now, before = self._account().seconds, self._before
        seconds = {phase: value + now.get(phase, 0.0) for phase, value in before.seconds.items()}
        return TimeSpent(seconds, before.idle_s + self._idle_s, before.launches + 1)

    def _account(self) -> Account:
        phases = self._phases
        return Account(self._launch, self._start_step, self._began, phases.step, phases.seconds())

    def _write(self, line: bytes) -> None:
        if self._path is None:
            return
        with contextlib.suppress(Exception):  # stores have errors of their own
            if is_remote(self._path):
                self._data += line
                self._path.write_bytes(self._data)  # not waited for: there will be another
            else:
                with self._path.open("ab") as file:
                    file.write(line)
