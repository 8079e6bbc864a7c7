"""Reinforcement on a page: rewards beside what judges them, and the alarms that were raised."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from capjax.reporting.charts import Mark
from capjax.reporting.curves import (
    Chart,
    Curves,
    axes_of_runs,
    evaluation_curves,
    place,
    splits_by_metric,
    training_curves,
)
from capjax.reporting.metric_names import named
from capjax.reporting.runs import Run
from capjax.rl.alarms import Alarms

_REWARD, _SPREAD = "train/reward", "reward_std"
_DIVERGENCE = Chart("Divergence (nats a caption)", {"kl": ""})
_LENGTH = Chart("Tokens a caption", {"caption_tokens": ""})
_OTHERS = (
    Chart("Spread of rewards within an image", {_SPREAD: ""}),
    Chart("Repeated pairs of tokens (share)", {"repetition": ""}),
    Chart("Unfinished captions (share)", {"unfinished": ""}),
    Chart("Entropy (nats a token)", {"entropy": ""}),
    Chart("Weight of the divergence", {"kl_weight": ""}, 0.0),
    Chart("Deviation of the ratio from 1", {"ratio_deviation": ""}),
    Chart("Clipped tokens (share)", {"clipped": ""}),
    Chart("Factor of the learning rate", {"rate_scale": ""}, 0.0),
)


class Reinforcement(NamedTuple):
    """Charts, of which `first` belong next to each other, and alarms as (run, step, text).

    judges: the names of the judge's metrics; `is_judged` where one of them is drawn.
    """

    first: list[Curves]
    others: list[Curves]
    alarms: list[tuple[int, int, str]]
    judges: list[str]
    is_judged: bool


def reinforcement(runs: Sequence[Run]) -> Reinforcement | None:
    """What is shown of runs that learnt from rewards; None where none did."""
    if not any(_REWARD in line for run in runs for line in run.metrics):
        return None
    names = sorted({name for run in runs for line in run.metrics for name in line})
    parts = [
        Chart(f"Reward: {name.replace('_', ' ')}", {f"reward_{name}": ""})
        for name in (n.removeprefix(f"{_REWARD}_") for n in names if n.startswith(f"{_REWARD}_"))
        if f"reward_{name}" != _SPREAD
    ]
    judges = list(dict.fromkeys(_judge(run) for run in runs))
    evaluated = splits_by_metric(runs)
    first, others, is_judged = [], [], False
    for axis in axes_of_runs(runs):
        how = {"span": _span(runs, axis), "marks": _marks(runs, axis)}
        first += training_curves(runs, axis, [Chart("Reward", {"reward": ""})], **how)
        for judge in judges:
            title, splits = f"Judge: {named(judge).title}", evaluated.get(judge, [])
            judged = evaluation_curves(runs, axis, title, judge, splits, **how)
            is_judged |= bool(judged)
            first += judged
        first += training_curves(runs, axis, [_DIVERGENCE, _LENGTH], **how)
        others += training_curves(runs, axis, [*parts, *_OTHERS], **how)
    alarms = [(i, step, text) for i, run in enumerate(runs) for step, text in run.alarms]
    return Reinforcement(first, others, alarms, judges, is_judged)


def _judge(run: Run) -> str:
    """The metric that the run's alarms compare its reward with."""
    return str((run.config.get("alarms") or {}).get("judge_metric") or Alarms.judge_metric)


def _span(runs: Sequence[Run], axis: str) -> tuple[int | float, int | float] | None:
    places = [place(line, axis) for run in runs for line in run.metrics]
    known = [x for x in places if not math.isnan(x)]
    return (min(known), max(known)) if known else None


def _marks(runs: Sequence[Run], axis: str) -> list[Mark]:
    marks = []
    for number, run in enumerate(runs):
        places = {line["step"]: place(line, axis) for line in run.metrics}
        name, colour = ("alarm", None) if len(runs) == 1 else (f"{run.name}: alarm", number)
        marks += [
            Mark(places[step], name, f"{text} (step {step})", colour)
            for step, text in run.alarms
            if step in places
        ]
    return marks
