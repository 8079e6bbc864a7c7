"""Line charts: round ticks, a debiased average, and SVG that parses whatever the names are."""

import html
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capjax.reporting.axes import BOTTOM, HEIGHT, TOP, axes_of, ticks
from capjax.reporting.charts import MAX_POINTS, Series, line_chart, smoothed


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 10, [0, 5, 10]),
        (0.13, 0.38, [0.1, 0.2, 0.3, 0.4]),
        (-3, 3, [-4, -2, 0, 2, 4]),
        (0, 3000, [0, 1000, 2000, 3000]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


finite = st.floats(-1e6, 1e6)


@given(finite, finite)
def test_ticks_span_the_range(a, b):
    low, high = min(a, b), max(a, b)
    made = ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-12)
    assert made[0] <= low + slack
    assert made[-1] >= high - slack
    assert 2 <= len(made) <= 12


def test_the_average_of_a_constant_is_the_constant_from_the_start():
    assert smoothed([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)


def test_the_average_by_hand():
    # (0.5 * 1, then 0.5 * 0.5 + 0.5 * 3) over (0.5, 0.75)
    assert smoothed([1.0, 3.0], 0.5) == pytest.approx([1.0, 1.75 / 0.75])


def test_points_lie_where_the_axes_say():
    figure = line_chart("loss", [Series("a", [0, 10], [0.0, 1.0])])
    svg = ET.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + 6])
    (line,) = svg.iter("polyline")
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line.get("points").split())
    assert x0 < x1
    assert y0 > y1  # SVG counts downwards
    grid = sorted(float(g.get("y1")) for g in svg.iter("line"))
    assert (y1, y0) == pytest.approx((grid[0], grid[-1]))  # the ticks of 1 and of 0
    data = json.loads(svg.get("data-chart"))
    assert data == [["a", [[x0, y0, "0 at step 0"], [x1, y1, "1 at step 10"]]]]


@given(finite, finite)
@example(2.3, 6.06)
@example(8.022673760022434e-53, 8.022673760022434e-53)
@example(0.0, 3e-301)
@example(1.01e-300, 1.5e-300)
def test_the_grid_stays_within_the_frame(a, b):
    places = re.findall(r' y1="([^"]*)"', "".join(axes_of([0, 1], [a, b]).grid("step")))
    assert len(places) >= 2
    assert all(TOP - 0.1 <= float(y) <= HEIGHT - BOTTOM + 0.1 for y in places)


def test_what_is_not_finite_is_left_out_and_nothing_gives_nothing():
    assert line_chart("loss", []) == ""
    assert line_chart("loss", [Series("a", [1, 2], [math.nan, math.inf])]) == ""
    figure = line_chart("loss", [Series("a", [1, 2, 3], [1.0, math.nan, 2.0])])
    assert len(re.search(r'points="([^"]*)"', figure)[1].split()) == 2


def test_a_long_line_is_thinned_to_its_ends():
    figure = line_chart("loss", [Series("a", range(100_000), [1.0] * 99_999 + [2.0])])
    points = re.search(r'points="([^"]*)"', figure)[1].split()
    assert len(points) <= MAX_POINTS + 1
    assert figure.count("NaN") == 0
    assert float(points[-1].split(",")[1]) < float(points[0].split(",")[1])  # the last value


@given(st.text(max_size=20), st.lists(finite, min_size=1, max_size=60), st.sampled_from([0.0, 0.9]))
def test_any_name_and_any_values_give_sound_markup(name, values, smooth):
    name = name.replace("\0", "")
    figure = line_chart(name, [Series(name, range(len(values)), values)], smooth=smooth)
    printable = "".join(c for c in figure if c in "\n\t" or ord(c) >= 32)
    try:
        ET.fromstring(printable)
    except ET.ParseError:
        assert re.search(r"[\ud800-\udfff\ufffe\uffff]", figure)  # XML has no such characters
    assert "<script" not in html.unescape(figure) or "<script" in name
