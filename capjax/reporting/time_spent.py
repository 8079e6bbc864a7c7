"""Where the time of runs went: a bar and a table."""

from collections.abc import Sequence
from typing import NamedTuple

from capjax.reporting.runs import Run
from capjax.training.progress import duration

# Phase -> its name on the page, its colour; in the order of the bar.
_PHASES = {
    "step": ("training steps", 2),
    "data": ("waiting for data", 5),
    "evaluation": ("evaluation", 0),
    "save": ("saving", 4),
    "compile": ("compiling", 3),
    "init": ("starting", 7),
    "lost": ("lost (done again)", 1),
}


class Phase(NamedTuple):
    """Of one run: its time, and that over the run's."""

    name: str
    colour: int
    time: str
    share: float
    percent: str


class Spent(NamedTuple):
    """The bar of one run."""

    run: str
    goodput: float
    total: str
    idle: str
    launches: int
    phases: list[Phase]


def time_spent_of(runs: Sequence[Run]) -> list[Spent]:
    """One bar for each run whose time is known."""
    made = []
    for run in runs:
        spent = run.time_spent
        if spent is None:
            continue
        shares = {phase: spent.seconds[phase] / max(spent.total_s, 1e-9) for phase in _PHASES}
        phases = [
            Phase(
                name,
                colour,
                duration(spent.seconds[phase]),
                round(shares[phase], 6),
                f"{100 * shares[phase]:.1f}",
            )
            for phase, (name, colour) in _PHASES.items()
        ]
        total, idle = duration(spent.total_s), duration(spent.idle_s)
        made.append(Spent(run.name, spent.goodput, total, idle, spent.launches, phases))
    return made
