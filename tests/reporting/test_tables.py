"""Tables: where each figure comes from, which leads, and what is exported."""

import csv
import io

import pytest

from capjax.evaluation.measured import Measured
from capjax.reporting.metric_names import GROUPS, in_order, named
from capjax.reporting.runs import read_runs
from capjax.reporting.tables import (
    Cell,
    Row,
    Table,
    guidance_tables,
    latex_text,
    result_tables,
    shown,
    to_csv,
    to_latex,
)
from capjax.reporting.tradeoff import tradeoff_plots


@pytest.fixture
def runs(tmp_path, make_run):
    return read_runs([make_run(tmp_path / "plain"), make_run(tmp_path / "other_one", shift=0.1)])


def test_one_run_has_its_splits_across_and_no_winner(runs):
    (table,) = result_tables(runs[:1])
    assert table.columns == ["concept"]
    rows = {row.metric: row for row in table.rows}
    assert rows["cider_d"].cells[0].interval is not None  # from evaluations/
    assert rows["exact_match"].cells == [Cell(0.4)]  # from the last line of metrics.jsonl
    assert not any(row.best for row in table.rows)


def test_several_runs_are_columns_and_the_best_leads(runs):
    (table,) = result_tables(runs)
    assert table.columns == ["plain", "other_one"]
    best = {row.metric: row.best for row in table.rows}
    assert best["cider_d"] == (1,)
    assert best["loss"] == ()  # both the same


def test_less_may_be_better_and_nothing_may_lead(runs):
    logged = [
        {"step": 1, "eval/a/loss": loss, "eval/a/num_words": 5.0 * loss} for loss in (2.0, 1.0)
    ]
    few = [
        run._replace(evaluations={}, captions={}, metrics=[line])
        for run, line in zip(runs, logged, strict=True)
    ]
    (table,) = result_tables(few)
    assert {row.metric: row.best for row in table.rows} == {"loss": (1,), "num_words": ()}


def test_a_test_of_another_kind_has_its_own_table(runs):
    other = Measured({"emoji_text": 0.5, "emoji_text_null_image": 0.4})
    more = Measured({"knn_top1": 0.75, "cider_d": 9.0})
    run = runs[0]._replace(
        evaluations=runs[0].evaluations | {"emoji": other, "concept@features": more}
    )
    concept, emoji = result_tables([run])
    assert (concept.name, emoji.name) == ("concept", "emoji")
    assert [row.title for row in emoji.rows] == ["emoji, text", "emoji, text, without the image"]
    values = {row.metric: row.cells[0].value for row in concept.rows}
    assert values["knn_top1"] == 0.75  # of the file beside the split's own, which goes before it
    assert values["cider_d"] == runs[0].evaluations["concept"].metrics["cider_d"]


def test_a_guidance_table_has_a_column_for_each_run_and_scale(runs):
    (table,) = guidance_tables(runs)
    assert table.columns == ["plain, 1", "plain, 2", "other_one, 1", "other_one, 2"]
    (cider,) = [row for row in table.rows if row.metric == "cider_d"]
    assert cider.cells[0].value == pytest.approx(2 * cider.cells[1].value)
    assert cider.best == (2,)


def test_csv_has_full_precision_and_empty_fields_for_what_is_missing():
    rows = [Row("m", "M", "Other", 0, [Cell(1 / 3, (0.25, 0.5)), None])]
    lines = list(csv.reader(io.StringIO(to_csv(Table("t", "", ["a,b", 'c"d'], rows)))))
    assert lines[0] == [
        "metric",
        "a,b",
        "a,b lower",
        "a,b upper",
        *(f'c"d{e}' for e in ("", " lower", " upper")),
    ]
    assert float(lines[1][1]) == 1 / 3
    assert lines[1][2:] == ["0.25", "0.5", "", "", ""]


def test_latex_escapes_names_and_marks_the_best():
    rows = [Row("m", "R@1", "Other", 1, [Cell(0.5, (0.4, 0.6)), None], best=(0,))]
    text = to_latex(Table("t", "", ["run_1 & 50%", "b"], rows))
    assert r"run\_1 \& 50\%" in text
    assert r"R@1 & \textbf{0.500} {\scriptsize [0.400, 0.600]} & -- \\" in text
    assert text.count("&") - text.count(r"\&") == 2 * 2  # two separators in each of two rows
    assert latex_text("\\~^{}#$") == (
        r"\textbackslash{}\textasciitilde{}\textasciicircum{}\{\}\#\$"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (0.12345, "0.123"),
        (-0.5, "-0.500"),
        (1.0, "1.000"),
        (12.345, "12.35"),
        (123.45, "123.5"),
        (412.0, "412"),
        (6519.7, "6,520"),
        (1832256, "1,832,256"),
    ],
)
def test_numbers_are_short(value, text):
    assert shown(value) == text


def test_metrics_stand_in_groups_and_count_as_numbers_do():
    names = [
        "zz",
        "loss",
        "fewshot_10_top1",
        "fewshot_5_top1",
        "bleu_4",
        "cider_d",
        "winoground_text",
    ]
    assert in_order(names) == [
        "cider_d",
        "bleu_4",
        "fewshot_5_top1",
        "fewshot_10_top1",
        "winoground_text",
        "loss",
        "zz",
    ]
    assert named("bags_5_r1")[:3] == ("bags of 5, R@1", "Retrieval", 1)
    assert named("an_unknown_one")[:3] == ("an unknown one", "Other", 0)
    assert all(named(name).group in GROUPS for name in names)


def test_a_trade_off_has_a_curve_a_run_and_a_point_a_scale(runs):
    plots = {(plot.x, plot.y): plot.figure for plot in tradeoff_plots(runs)}
    figure = plots["cider_d", "caption_to_image_r1"]
    assert figure.count('class="line') == 2
    assert figure.count("<circle") == 4
    assert figure.count('class="error') == 4  # the points' intervals in CIDEr-D
    assert ">other_one<" in figure
    assert set(plots) == {("cider_d", y) for y in ("caption_to_image_r1", "distinct_ratio")}
