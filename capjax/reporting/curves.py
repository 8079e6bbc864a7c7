"""The curves of one or several runs, over steps and, where runs are compared, over time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from capjax.reporting.charts import Series, line_chart
from capjax.reporting.metric_names import in_order, is_count, named
from capjax.reporting.runs import Run

SMOOTHING = 0.8
# Of training: title, the metrics drawn together where one run is shown, smoothing.
_TRAINING = (
    ("Training loss", ("loss", "causal_loss", "parallel_loss", "contrastive_loss"), SMOOTHING),
    ("Images per second", ("images_per_s",), 0.0),
    ("Gradient norm", ("grad_norm",), SMOOTHING),
    ("Learning rate", ("learning_rate",), 0.0),
)
# What the x axis says, the field of a line of metrics.jsonl, and what it is divided by.
AXES = {"step": ("step", "step", 1), "time": ("minute", "wall_s", 60)}


class Curves(NamedTuple):
    """A drawn chart; `split` is "" where it is of training or of all splits."""

    axis: str
    split: str
    figure: str


def curves(runs: Sequence[Run]) -> list[Curves]:
    """Every chart. One run: its splits overlaid. Several: the runs overlaid, a chart a split.

    An evaluation metric is drawn where some line of it has two points: one is in the table.
    """
    axes = list(AXES) if len(runs) > 1 else ["step"]
    made = [curve for axis in axes for curve in (*_training(runs, axis), *_evaluation(runs, axis))]
    return [curve for curve in made if curve.figure]


def series_of(run: Run, name: str, label: str, axis: str = "step", colour: int = 0) -> Series:
    """The values of one metric where it was logged, in ascending order of the axis."""
    _, field, unit = AXES[axis]
    points = [
        (line[field] / unit, line[name]) if unit != 1 else (line[field], line[name])
        for line in run.metrics
        if _is_number(line.get(name)) and _is_number(line.get(field))
    ]
    points.sort(key=lambda point: point[0])
    return Series(label, [x for x, _ in points], [value for _, value in points], colour)


def _training(runs: Sequence[Run], axis: str) -> list[Curves]:
    made = []
    for title, metrics, smooth in _TRAINING:
        if len(runs) == 1:
            groups = [
                (
                    title,
                    [
                        (runs[0], metric, metric.replace("_", " "), i)
                        for i, metric in enumerate(metrics)
                    ],
                )
            ]
        else:
            groups = [
                (
                    title if metric == metrics[0] else f"{title}: {named(metric).title}",
                    [(run, metric, run.name, i) for i, run in enumerate(runs)],
                )
                for metric in metrics
            ]
        for heading, lines in groups:
            series = [
                series_of(run, f"train/{metric}", label, axis, colour)
                for run, metric, label, colour in lines
            ]
            made.append(
                Curves(axis, "", line_chart(heading, series, smooth=smooth, x_label=AXES[axis][0]))
            )
    return made


def _evaluation(runs: Sequence[Run], axis: str) -> list[Curves]:
    names = {name for run in runs for line in run.metrics for name in line}
    pairs = {
        tuple(n.split("/", 2)[1:]) for n in names if n.startswith("eval/") and n.count("/") > 1
    }
    splits = sorted({split for split, _ in pairs})
    made = []
    for metric in in_order({metric for _, metric in pairs}):
        if is_count(metric) or "perplexity" in metric:  # the exponential of a loss that is drawn
            continue
        title = f"Evaluation: {named(metric).title}"
        if len(runs) == 1:
            groups = [("", title, [(runs[0], split, split) for split in splits])]
        else:
            groups = [
                (split, f"{title} ({split})", [(run, split, run.name) for run in runs])
                for split in splits
            ]
        for split, heading, lines in groups:
            series = [
                series_of(run, f"eval/{of}/{metric}", label, axis, colour)
                for colour, (run, of, label) in enumerate(lines)
            ]
            if max(len(line.steps) for line in series) > 1:
                drawn = line_chart(heading, series, x_label=AXES[axis][0])
                made.append(Curves(axis, split, drawn))
    return made


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
