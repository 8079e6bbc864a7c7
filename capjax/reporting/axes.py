"""The frame of a chart as inline SVG: round ticks, a grid, a place for every point, a legend."""

import html
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 20, 12, 36
COLOURS = 8  # that page.css defines; more lines than that share them

Number = int | float


class Axes(NamedTuple):
    """The ranges that a chart shows; pixels are of its `viewBox`, y downwards."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def place(self, x: Number, y: Number) -> tuple[float, float]:
        """Where a point lies, in pixels."""
        right = (x - self.x_low) / (self.x_high - self.x_low)
        up = (y - self.y_low) / (self.y_high - self.y_low)
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def grid(self, x_label: str) -> list[str]:
        """Lines at the ticks of y, the numbers of both axes, and what x is."""
        parts = []
        within = [t for t in ticks(self.y_low, self.y_high) if self.y_low <= t <= self.y_high]
        for tick in within:
            _, y = self.place(self.x_low, tick)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                f"{tick:g}</text>"
            )
        for tick in ticks(self.x_low, self.x_high):
            if self.x_low <= tick <= self.x_high:
                x, _ = self.place(tick, self.y_low)
                parts.append(
                    f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" '
                    f'text-anchor="middle">{tick:g}</text>'
                )
        parts.append(
            f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" '
            f'text-anchor="middle">{html.escape(x_label)}</text>'
        )
        return parts


def axes_of(xs: Sequence[Number], ys: Sequence[Number], *, round_x: bool = False) -> Axes:
    """Axes that show all points: y from a tick to a tick, x to its ends (to ticks: `round_x`)."""
    y_ticks, x_ticks = ticks(min(ys), max(ys)), ticks(min(xs), max(xs))
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    if round_x:
        x_low, x_high = min(x_ticks[0], x_low), max(x_ticks[-1], max(xs))
    return Axes(x_low, x_high, min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)))


def figure(
    title: str,
    parts: Sequence[str],
    legend: Sequence[tuple[int, str]],
    points: Sequence[tuple[str, Sequence[Sequence[Any]]]],
) -> str:
    """A `<figure>` of SVG `parts`.

    Args:
      legend: (colour, name) of each line; one line alone needs none.
      points: of each line its name and [x pixel, y pixel, what the tooltip says] of its points.
    """
    data = html.escape(json.dumps(points), quote=True).replace("'", "&#39;")
    shown = "".join(
        f'<span><i class="key c{colour % COLOURS}"></i>{html.escape(name)}</span>'
        for colour, name in legend
        if len(legend) > 1
    )
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}" '
        f"data-chart='{data}'>{''.join(parts)}</svg>"
        f'<div class="legend">{shown}</div></figure>'
    )


def polyline(points: Sequence[tuple[float, float]], classes: str) -> str:
    """A line through points given in pixels."""
    return (
        f'<polyline class="{classes}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'
    )


def ticks(low: Number, high: Number, count: int = 5) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten) that span [low, high]."""
    tiny = 1e-300  # less cannot be divided into ticks
    if high - low <= max(1e-9 * max(abs(low), abs(high)), tiny):  # a flat line, in the middle
        around = abs(low) if abs(low) > tiny else 1
        low, high = low - around / 2, low + around / 2
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]
