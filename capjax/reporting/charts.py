"""Line charts as inline SVG: no script is needed to read them, and colours follow the page."""

import html
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 14, 34

Number = int | float


class Series(NamedTuple):
    """One line: `values` over `steps`, ascending. Values that are not finite are left out."""

    name: str
    steps: Sequence[Number]
    values: Sequence[Number]


def line_chart(title: str, series: Sequence[Series], *, smooth: float = 0.0) -> str:
    """A `<figure>` with the lines over the step axis, a legend, and the points for the tooltip.

    smooth: in [0, 1); above 0 each line is drawn faint, and its debiased exponential moving
      average with this decay in full.
    """
    drawn = [kept for line in series if (kept := _finite(line)).steps]
    if not drawn:
        return ""
    xs = [x for line in drawn for x in line.steps]
    ys = [y for line in drawn for y in line.values]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(x: Number, y: Number) -> tuple[float, float]:
        right = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}" '
        f"data-chart='{_tooltip_data(drawn, place)}'>"
    ]
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, _ = place(tick, y_low)
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" '
                f'text-anchor="middle">{tick:g}</text>'
            )
    parts.append(
        f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" '
        f'text-anchor="middle">step</text>'
    )
    for number, line in enumerate(drawn):
        if smooth:
            parts.append(_path(line.steps, line.values, place, f"raw c{number % 6}"))
        values = smoothed(line.values, smooth) if smooth else line.values
        parts.append(_path(line.steps, values, place, f"line c{number % 6}"))
        if len(line.steps) <= 40 and not smooth:
            parts += [
                f'<circle class="dot c{number % 6}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
                for x, y in (place(*point) for point in zip(line.steps, values, strict=True))
            ]
    parts.append("</svg>")
    legend = "".join(
        f'<span><i class="key c{number % 6}"></i>{html.escape(line.name)}</span>'
        for number, line in enumerate(drawn)
    )
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>{''.join(parts)}"
        f'<div class="legend">{legend}</div></figure>'
    )


def ticks(low: Number, high: Number, count: int = 5) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten) that span [low, high]."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):  # a flat line, in the middle
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def smoothed(values: Sequence[Number], decay: float) -> list[float]:
    """Exponential moving average, debiased as in Adam: the first value is the first value."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out.append(average / weight)
    return out


def _finite(line: Series) -> Series:
    points = [
        (x, y)
        for x, y in zip(line.steps, line.values, strict=True)
        if isinstance(y, (int, float)) and math.isfinite(y)
    ]
    return Series(line.name, [x for x, _ in points], [y for _, y in points])


def _path(xs: Sequence[Number], ys: Sequence[Number], place, classes: str) -> str:
    points = (place(x, y) for x, y in zip(xs, ys, strict=True))
    return (
        f'<polyline class="{classes}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'
    )


def _tooltip_data(drawn: Sequence[Series], place, most: int = 400) -> str:
    """JSON [[name, [[x pixel, y pixel, step, value], …]], …], thinned to `most` points a line."""
    data = []
    for line in drawn:
        every = max(1, math.ceil(len(line.steps) / most))
        points = list(zip(line.steps, line.values, strict=True))[::every]
        data.append(
            [
                line.name,
                [[*(round(v, 1) for v in place(x, y)), x, float(f"{y:.5g}")] for x, y in points],
            ]
        )
    return html.escape(json.dumps(data), quote=True).replace("'", "&#39;")
