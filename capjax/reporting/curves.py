"""The curves of one or several runs, over steps and, where runs are compared, over time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from capjax.reporting.charts import Series, line_chart
from capjax.reporting.metric_names import in_order, is_count, named
from capjax.reporting.runs import Run

SMOOTHING = 0.8
# What the x axis says, the field of a line of metrics.jsonl, and what it is divided by.
AXES = {"step": ("step", "step", 1), "time": ("minute", "wall_s", 60)}


class Chart(NamedTuple):
    """A chart of training, where one run is shown; of several runs there is one a line.

    lines: `train/<name>` and what the line is called.
    """

    title: str
    lines: Mapping[str, str]
    smooth: float = SMOOTHING


_LOSSES = {
    "loss": "total",
    "causal_loss": "causal",
    "parallel_loss": "parallel",
    "contrastive_loss": "contrastive",
}
_BY_IMAGE = {"conditional_causal_loss": "seen", "unconditional_causal_loss": "dropped"}
_TRAINING = (
    Chart("Training loss", _LOSSES),
    Chart("Causal loss by whether the image is", _BY_IMAGE),
    Chart("Images per second", {"images_per_s": ""}, 0.0),
    Chart("Gradient norm", {"grad_norm": ""}),
    Chart("Learning rate", {"learning_rate": ""}, 0.0),
)


class Curves(NamedTuple):
    """A drawn chart; `split` is "" where it is of training or of all splits."""

    axis: str
    split: str
    figure: str


def curves(runs: Sequence[Run]) -> list[Curves]:
    """Every chart. One run: its splits overlaid. Several: the runs overlaid, a chart a split.

    An evaluation metric is drawn where some line of it has two points: one is in the table.
    """
    evaluated = splits_by_metric(runs)
    made = []
    for axis in axes_of_runs(runs):
        made += training_curves(runs, axis, _TRAINING)
        for metric in in_order(evaluated):
            # A perplexity is the exponential of a loss that is drawn.
            if not is_count(metric) and "perplexity" not in metric:
                title = f"Evaluation: {named(metric).title}"
                made += evaluation_curves(runs, axis, title, metric, evaluated[metric])
    return made


def axes_of_runs(runs: Sequence[Run]) -> list[str]:
    """Those of `AXES` that their charts are drawn over."""
    return list(AXES) if len(runs) > 1 else ["step"]


def splits_by_metric(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The splits of which each evaluation metric was logged."""
    names = {name for run in runs for line in run.metrics for name in line}
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.startswith("eval/") and name.count("/") > 1:
            _, split, metric = name.split("/", 2)
            found.setdefault(metric, []).append(split)
    return found


def place(line: Mapping[str, Any], axis: str) -> int | float:
    """Where a line of metrics lies on an axis; NaN where it does not say."""
    _, field, unit = AXES[axis]
    value = line.get(field, math.nan)
    if not _is_number(value):
        return math.nan
    return value / unit if unit != 1 else value


def training_curves(
    runs: Sequence[Run], axis: str, charts: Sequence[Chart], **how: Any
) -> list[Curves]:
    """The charts of which something was logged. `how`: more of `line_chart`."""
    made = []
    for chart in charts:
        if len(runs) == 1:
            lines = [
                (runs[0], metric, label or chart.title.lower(), colour)
                for colour, (metric, label) in enumerate(chart.lines.items())
            ]
            groups = [(chart.title, lines)]
        else:
            groups = [
                (
                    f"{chart.title}: {label}" if label else chart.title,
                    [(run, metric, run.name, colour) for colour, run in enumerate(runs)],
                )
                for metric, label in chart.lines.items()
            ]
        for heading, lines in groups:
            series = [
                _series(run, f"train/{metric}", label, axis, colour)
                for run, metric, label, colour in lines
            ]
            made += _drawn(heading, series, axis, smooth=chart.smooth, **how)
    return made


def evaluation_curves(
    runs: Sequence[Run], axis: str, title: str, metric: str, splits: Sequence[str], **how: Any
) -> list[Curves]:
    """The charts of an evaluation metric where some line has two points; `how` as above."""
    if len(runs) == 1:
        groups = [("", title, [(runs[0], split, split) for split in splits])]
    else:
        groups = [
            (split, f"{title} ({split})", [(run, split, run.name) for run in runs])
            for split in splits
        ]
    made = []
    for split, heading, lines in groups:
        series = [
            _series(run, f"eval/{of}/{metric}", label, axis, colour)
            for colour, (run, of, label) in enumerate(lines)
        ]
        if max((len(line.steps) for line in series), default=0) > 1:
            made += _drawn(heading, series, axis, split, **how)
    return made


def _drawn(
    title: str, series: Sequence[Series], axis: str, split: str = "", **how: Any
) -> list[Curves]:
    figure = line_chart(title, series, x_label=AXES[axis][0], **how)
    return [Curves(axis, split, figure)] if figure else []


def _series(run: Run, name: str, label: str, axis: str, colour: int) -> Series:
    """The values of one metric where it was logged, in ascending order of the axis."""
    points = [
        (x, line[name])
        for line in run.metrics
        if _is_number(line.get(name)) and not math.isnan(x := place(line, axis))
    ]
    points.sort(key=lambda point: point[0])
    return Series(label, [x for x, _ in points], [value for _, value in points], colour)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
