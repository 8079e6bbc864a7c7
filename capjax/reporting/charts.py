"""Line charts as inline SVG: no script is needed to read them, and colours follow the page."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from capjax.reporting.axes import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    TOP,
    Number,
    axes_of,
    figure,
    polyline,
)

MAX_POINTS = 600  # drawn of one line
_TIPS = 200  # points of one line that the tooltip knows
_DOTS = 40  # a line of at most this many points shows them


class Series(NamedTuple):
    """One line: `values` over `steps`, ascending. Values that are not finite are left out."""

    name: str
    steps: Sequence[Number]
    values: Sequence[Number]
    colour: int | None = None  # None: its place among the lines


class Mark(NamedTuple):
    """Something that happened at `x`, drawn upright; the tooltip says `name` and `text`."""

    x: Number
    name: str
    text: str
    colour: int | None = None  # None: that of what is bad


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    smooth: float = 0.0,
    x_label: str = "step",
    span: tuple[Number, Number] | None = None,
    marks: Sequence[Mark] = (),
) -> str:
    """A `<figure>` with the lines over the step axis, a legend, and the points for the tooltip.

    smooth: in [0, 1); above 0 each line is drawn faint, and its debiased exponential moving
      average with this decay in full.
    span: of x, which is shown whole, so that charts beside each other agree.
    marks: those within what is shown are drawn.

    Returns "" where no line has a finite value.
    """
    drawn = [
        kept._replace(colour=number if line.colour is None else line.colour)
        for number, line in enumerate(series)
        if (kept := _finite(line)).steps
    ]
    if not drawn:
        return ""
    xs = [x for line in drawn for x in line.steps] + list(span or ())
    axes = axes_of(xs, [y for line in drawn for y in line.values])
    parts, tips = axes.grid(x_label), []
    for mark in marks:
        if axes.x_low <= mark.x <= axes.x_high:
            x, _ = axes.place(mark.x, axes.y_high)
            parts.append(_upright(x, mark.colour))
            tips.append((mark.name, [[round(x, 1), TOP, mark.text]]))
    for line in drawn:
        colour = f"c{(line.colour or 0) % COLOURS}"
        values = smoothed(line.values, smooth) if smooth else line.values
        if smooth:
            raw = zip(line.steps, line.values, strict=True)
            parts.append(polyline([axes.place(*p) for p in _thinned([*raw])], f"raw {colour}"))
        points = _thinned([*zip(line.steps, values, strict=True)])
        parts.append(polyline([axes.place(*p) for p in points], f"line {colour}"))
        if len(points) <= _DOTS and not smooth:
            parts += [
                f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
                for x, y in (axes.place(*point) for point in points)
            ]
        known = _thinned([*zip(line.steps, line.values, strict=True)], _TIPS)
        tips.append(
            (
                line.name,
                [
                    [*(round(v, 1) for v in axes.place(x, y)), f"{y:.5g} at {x_label} {x:.6g}"]
                    for x, y in known
                ],
            )
        )
    return figure(title, parts, [(line.colour or 0, line.name) for line in drawn], tips)


def smoothed(values: Sequence[Number], decay: float) -> list[float]:
    """Exponential moving average, debiased as in Adam: the first value is the first value."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out.append(average / weight)
    return out


def _upright(x: float, colour: int | None) -> str:
    classes = "mark" if colour is None else f"mark c{colour % COLOURS}"
    return f'<path class="{classes}" d="M{x:.1f} {HEIGHT - BOTTOM}V{TOP}m-4-6h8l-4 6z"/>'


def _finite(line: Series) -> Series:
    points = [
        (x, y)
        for x, y in zip(line.steps, line.values, strict=True)
        if isinstance(y, (int, float)) and math.isfinite(y)
    ]
    return line._replace(steps=[x for x, _ in points], values=[y for _, y in points])


def _thinned(points: list[tuple[Number, Number]], most: int = MAX_POINTS) -> list:
    """Every k-th point, and always the last."""
    every = math.ceil(len(points) / most)
    return points if every <= 1 else points[:-1:every] + points[-1:]
