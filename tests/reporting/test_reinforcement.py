"""Rewards beside their judge, alarms at their steps, captions of the same images over time."""

import json
import re
import xml.etree.ElementTree as ET

import pytest

from capjax.reporting.charts import Mark, Series, line_chart
from capjax.reporting.curves import curves
from capjax.reporting.over_time import MAX_STEPS, samples
from capjax.reporting.page import write_report
from capjax.reporting.reinforcement import reinforcement
from capjax.reporting.runs import read_runs

FIRST = ["Reward", "Judge: caption to image R@1", "Divergence (nats a caption)", "Tokens a caption"]
OTHERS = [
    *("Reward: cider d", "Reward: colours", "Spread of rewards within an image"),
    *("Repeated pairs of tokens (share)", "Unfinished captions (share)"),
]


def titles(made) -> list[str]:
    return [re.search(r"<figcaption>([^<]*)<", curve.figure)[1] for curve in made]


def svg_of(figure: str) -> ET.Element:
    return ET.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + 6])


def tips(figure: str) -> list[tuple[str, list]]:
    """What the tooltip knows: of each line or mark its name and points [x, y, text]."""
    return [(name, points) for name, points in json.loads(svg_of(figure).get("data-chart"))]


def place(figure: str, line: str, says: str) -> float:
    """Where the first point of a line, or mark, of which the tooltip says that, lies."""
    return next(
        x for name, points in tips(figure) for x, _, t in points if name == line and says in t
    )


def test_what_was_logged_is_drawn_the_judge_beside_the_reward(tmp_path, make_reinforced):
    found = reinforcement(read_runs([make_reinforced(tmp_path / "run")]))
    assert titles(found.first) == FIRST
    assert titles(found.others) == OTHERS
    assert found.is_judged
    reward, judge = (curve.figure for curve in found.first[:2])
    assert [name for name, _ in tips(judge)] == ["alarm", "alarm", "concept", "val"]
    # Over the same steps, though the judge's begin at 20.
    assert place(reward, "reward", "0.5 at step 20") == place(judge, "val", "0.25 at step 20")


def test_alarms_are_at_their_steps(tmp_path, make_reinforced):
    found = reinforcement(read_runs([make_reinforced(tmp_path / "run")]))
    assert found.alarms == [
        (0, 3, "captions have <b>9.0</b> tokens, 4.0 at first"),
        (0, 20, "31% of the pairs of tokens in captions are repeated"),
    ]
    assert all(curve.figure.count('class="mark"') == 2 for curve in found.first + found.others)
    text = write_report([tmp_path / "run"]).read_text()
    assert "captions have &lt;b&gt;9.0&lt;/b&gt; tokens" in text
    assert "<b>step 20</b> 31% of the pairs" in text
    assert "No alarm was raised" not in text


def test_several_runs_have_a_chart_each_of_a_split_and_an_axis(tmp_path, make_reinforced, make_run):
    roots = [make_reinforced(tmp_path / name) for name in ("a", "b")]
    found = reinforcement(read_runs([*roots, make_run(tmp_path / "supervised")]))
    judges = [f"{FIRST[1]} ({split})" for split in ("concept", "val")]
    assert titles(found.first) == [FIRST[0], *judges, *FIRST[2:]] * 2
    assert titles(found.others) == OTHERS * 2
    assert [curve.axis for curve in found.first] == ["step"] * 5 + ["time"] * 5
    assert [number for number, *_ in found.alarms] == [0, 0, 1, 1]
    drawn = found.first[-1].figure  # over time: alarms are at the minutes of their steps
    assert drawn.count('class="mark c1"') == 2
    assert place(drawn, "b: alarm", "(step 20)") == place(drawn, "b", "at minute 1")
    text = write_report(roots).read_text()
    assert text.count('id="axis"') == 1
    assert 'id="over-time"' not in text


def test_the_judge_is_the_one_that_alarms_watch(tmp_path, make_reinforced):
    found = reinforcement(read_runs([make_reinforced(tmp_path / "run", judge="clip_score")]))
    assert found.judges == ["clip_score"]
    assert titles(found.first)[1] == "Judge: CLIPScore"


def test_without_rewards_or_a_judge(tmp_path, make_run, make_reinforced):
    assert reinforcement(read_runs([make_run(tmp_path / "supervised")])) is None
    root = make_reinforced(tmp_path / "run")
    (root / "alarms.jsonl").unlink()
    lines = (root / "metrics.jsonl").read_text().splitlines()
    (root / "metrics.jsonl").write_text("\n".join(line for line in lines if "eval/" not in line))
    assert not reinforcement(read_runs([root])).is_judged
    text = write_report([root]).read_text()
    assert "No judge is drawn here" in text
    assert "No alarm was raised" in text


def test_loss_with_and_without_the_image(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    line = {"step": 1, "train/conditional_causal_loss": 1.0, "train/unconditional_causal_loss": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    (only,) = curves(read_runs([tmp_path]))
    assert [name for name, _ in tips(only.figure)] == ["seen", "dropped"]


def test_a_mark_stands_at_its_place_and_beyond_the_chart_there_is_none():
    marks = [Mark(5, "alarm", "here"), Mark(11, "alarm", "beyond")]
    figure = line_chart("a", [Series("a", [4, 6], [0.0, 1.0])], span=(0, 10), marks=marks)
    (place,) = re.findall(r'class="mark" d="M([\d.]+) ', figure)
    (line,) = svg_of(figure).iter("polyline")
    xs = [float(point.split(",")[0]) for point in line.get("points").split()]
    assert float(place) == pytest.approx(sum(xs) / 2)


def test_captions_over_time_are_text_beside_their_image(tmp_path, make_reinforced):
    root = make_reinforced(tmp_path / "run")
    (table,) = samples(read_runs([root])[0], 10)
    assert table.steps == [20, 40] and table.left_out == 0
    assert table.rows[1].captions == ["said at 20", "said at 40"]
    assert all(row.image and row.reference for row in table.rows)
    assert [bool(row.image) for row in samples(read_runs([root])[0], 1)[0].rows] == [True, False]
    text = write_report([root]).read_text()
    assert text.count("<script") == text.count("</script>") == 2
    cells = re.search(r'id="over-time">.*?</section>', text, re.DOTALL)[0]
    assert cells.count('class="same"') == 1  # the script, said again; the other caption is new
    assert '<td dir="auto">said at 40</td>' in cells


def test_of_many_steps_some_are_shown_the_first_and_the_last_among_them(tmp_path, make_reinforced):
    root = make_reinforced(tmp_path / "run")
    lines = [{"step": step, "key": "gone", "caption": f"{step}"} for step in range(1, 101)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "captions" / "over_time" / "concept.jsonl").write_text(text)
    (table,) = samples(read_runs([root])[0], 10)
    assert len(table.steps) == MAX_STEPS == len(set(table.steps))
    assert (table.steps[0], table.steps[-1], table.left_out) == (1, 100, 100 - MAX_STEPS)
    assert table.rows[0].captions == [str(step) for step in table.steps]
    assert table.rows[0].image == ""  # of an image that the captions of the split do not have
