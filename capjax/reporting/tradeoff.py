"""Trade-off plots: agreement with references against what needs none, over guidance scales.

One curve a model, one point a scale, as in figure 1 of "Guiding image captioning models toward more
specific captions" (Kornblith et al., 2023).
"""

import html
from collections.abc import Sequence
from typing import NamedTuple

from capjax.reporting.axes import COLOURS, axes_of, figure, polyline
from capjax.reporting.metric_names import REFERENCE_BASED, REFERENCE_FREE, named
from capjax.reporting.runs import Run, splits_of
from capjax.reporting.tables import Cell, guided, shown

# Where the labels of a curve stand, so that those of two curves seldom meet: pixels to the right
# and down of its points, and the end of the text that is there.
_LABEL_PLACES = ((6, -6, "start"), (-6, 14, "end"), (6, 14, "start"), (-6, -6, "end"))


class Point(NamedTuple):
    """One evaluation: `label` is drawn beside it."""

    label: str
    x: Cell
    y: Cell


class Curve(NamedTuple):
    """The points of one model, joined in their order."""

    name: str
    colour: int
    points: list[Point]


class Plot(NamedTuple):
    """A drawn plot and what it is of."""

    split: str
    x: str
    y: str
    figure: str


def tradeoff_plots(runs: Sequence[Run]) -> list[Plot]:
    """A plot for each split and each pair of a reference-based and a reference-free metric.

    A pair is plotted where at least two points have both.
    """
    plots = []
    for split in splits_of(runs):
        for x in REFERENCE_BASED:
            for y in REFERENCE_FREE:
                curves = [_curve(run, number, split, x, y) for number, run in enumerate(runs)]
                if sum(len(curve.points) for curve in curves) > 1:
                    title = f"{split}: {named(y).title} against {named(x).title}"
                    drawn = tradeoff_chart(title, curves, named(x).title)
                    plots.append(Plot(split, x, y, drawn))
    return plots


def tradeoff_chart(title: str, curves: Sequence[Curve], x_label: str) -> str:
    """A `<figure>`: curves of labelled points, with a cross where a point has intervals."""
    curves = [curve for curve in curves if curve.points]
    points = [point for curve in curves for point in curve.points]
    axes = axes_of(
        [v for point in points for v in (point.x.value, *(point.x.interval or ()))],
        [v for point in points for v in (point.y.value, *(point.y.interval or ()))],
        round_x=True,
    )
    parts, tips = axes.grid(x_label), []
    for curve in curves:
        colour = f"c{curve.colour % COLOURS}"
        right, down, anchor = _LABEL_PLACES[curve.colour % len(_LABEL_PLACES)]
        places = [axes.place(point.x.value, point.y.value) for point in curve.points]
        parts.append(polyline(places, f"line {colour}"))
        tips.append((curve.name, []))
        for point, (x, y) in zip(curve.points, places, strict=True):
            for low, high in _crosses(point):
                parts.append(polyline([axes.place(*low), axes.place(*high)], f"error {colour}"))
            parts.append(
                f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
                f'<text class="label {colour}" x="{x + right:.1f}" y="{y + down:.1f}" '
                f'text-anchor="{anchor}">'
                f"{html.escape(point.label)}</text>"
            )
            says = f"guidance {point.label}: {shown(point.x.value)}, {shown(point.y.value)}"
            tips[-1][1].append([round(x, 1), round(y, 1), says])
    return figure(title, parts, [(curve.colour, curve.name) for curve in curves], tips)


def _curve(run: Run, colour: int, split: str, x: str, y: str) -> Curve:
    points = [
        Point(f"{scale:g}", cells[x], cells[y])
        for scale, cells in guided(run, split)
        if x in cells and y in cells
    ]
    return Curve(run.name, colour, points)


def _crosses(point: Point) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    lines = []
    if point.x.interval:
        low, high = point.x.interval
        lines.append(((low, point.y.value), (high, point.y.value)))
    if point.y.interval:
        low, high = point.y.interval
        lines.append(((point.x.value, low), (point.x.value, high)))
    return lines
