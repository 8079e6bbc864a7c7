"""The tables of a page: metrics down, runs or splits across; as CSV and as LaTeX too."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from capjax.reporting.metric_names import in_order, named
from capjax.reporting.runs import (
    Run,
    evaluations_of,
    guidance_scale,
    last_evaluation,
    split_of,
    splits_of,
)

_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


class Cell(NamedTuple):
    """A number, and its 95 % interval where one was computed."""

    value: float
    interval: tuple[float, float] | None = None


class Row(NamedTuple):
    """A metric; a cell is None where that column lacks it. `best`: the columns that lead."""

    metric: str
    title: str
    group: str
    better: int
    cells: list[Cell | None]
    best: tuple[int, ...] = ()


class Table(NamedTuple):
    """`name` is for the heading and the exported file; `split` is "" where it is of several."""

    name: str
    split: str
    columns: list[str]
    rows: list[Row]


def result_tables(runs: Sequence[Run]) -> list[Table]:
    """Of one run, splits side by side; of several, a table for each split with a column a run.

    Splits side by side have metrics in common: a test of another kind has its own table.
    The values are of evaluations/<split>.json, and of the last evaluation in training where that
    file does not have them.
    """
    if len(runs) == 1:
        cells = {split: _cells(runs[0], split) for split in splits_of(runs)}
        groups = sorted(_alike(cells), key=len, reverse=True)
        tables = [
            _table(
                "all splits" if len(groups) == 1 else ", ".join(group),
                "",
                group,
                [cells[split] for split in group],
                compare=False,
            )
            for group in groups
        ]
    else:
        names = [run.name for run in runs]
        tables = [
            _table(split, split, names, [_cells(run, split) for run in runs], compare=True)
            for split in splits_of(runs)
        ]
    return [table for table in tables if table.rows]


def guidance_tables(runs: Sequence[Run]) -> list[Table]:
    """For each split, a column for each run and guidance scale that an evaluation file is of."""
    tables = []
    for split in splits_of(runs):
        columns, cells = [], []
        for run in runs:
            for scale, of in guided(run, split):
                columns.append(f"{run.name}, {scale:g}" if len(runs) > 1 else f"{scale:g}")
                cells.append(of)
        table = _table(f"{split}, by guidance scale", split, columns, cells, compare=True)
        if len(columns) > 1 and table.rows:
            tables.append(table)
    return tables


def guided(run: Run, split: str) -> list[tuple[float, dict[str, Cell]]]:
    """The evaluation files of a split that note a guidance scale, by scale."""
    found = [
        (scale, _measured_cells(measured))
        for name, measured in run.evaluations.items()
        if split_of(name) == split and (scale := guidance_scale(measured)) is not None
    ]
    return sorted(found, key=lambda pair: pair[0])


def skipped_and_notes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each evaluation file: what was not measured and why, and how the rest was."""
    return [
        {
            "title": f"{run.name}: {name}" if len(runs) > 1 else name,
            "skipped": [(named(metric).title, why) for metric, why in measured.skipped.items()],
            "notes": [
                (
                    note.replace("_", " "),
                    value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
                )
                for note, value in measured.notes.items()
            ],
        }
        for run in runs
        for name, measured in run.evaluations.items()
        if measured.skipped or measured.notes
    ]


def shown(value: int | float) -> str:
    """A number with about four figures, thousands set apart."""
    if float(value).is_integer() and abs(value) >= 2:
        return f"{int(value):,}"
    for limit, digits in ((10, 3), (100, 2), (1000, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def to_csv(table: Table) -> str:
    """Full precision: a column a value, and its interval's bounds where any row has one."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ["metric"]
    for column in table.columns:
        header += [column, f"{column} lower", f"{column} upper"]
    writer.writerow(header)
    for row in table.rows:
        line: list[Any] = [row.metric]
        for cell in row.cells:
            line += ["", "", ""] if cell is None else [cell.value, *(cell.interval or ("", ""))]
        writer.writerow(line)
    return out.getvalue()


def to_latex(table: Table) -> str:
    r"""A `tabular` for booktabs; intervals in `\scriptsize`, the leading figure of a row bold."""
    lines = [rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
    lines.append(" & ".join(["", *map(latex_text, table.columns)]) + r" \\")
    group = None
    for row in table.rows:
        if row.group != group:
            lines.append(r"\midrule")
            group = row.group
        cells = [_latex_cell(cell, i in row.best) for i, cell in enumerate(row.cells)]
        lines.append(" & ".join([latex_text(row.title), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def latex_text(text: str) -> str:
    """Text in which no character means anything to LaTeX."""
    return "".join(_LATEX.get(c, c) for c in text)


def _latex_cell(cell: Cell | None, is_best: bool) -> str:
    if cell is None:
        return "--"
    text = rf"\textbf{{{shown(cell.value)}}}" if is_best else shown(cell.value)
    if cell.interval is None:
        return text
    low, high = map(shown, cell.interval)
    return rf"{text} {{\scriptsize [{low}, {high}]}}"


def _cells(run: Run, split: str) -> dict[str, Cell]:
    logged = last_evaluation(run).get(split, {})
    cells = {metric: Cell(value) for metric, value in logged.items() if _is_number(value)}
    for measured in reversed(evaluations_of(run, split)):
        cells |= _measured_cells(measured)
    return cells


def _measured_cells(measured: Any) -> dict[str, Cell]:
    return {
        metric: Cell(value, measured.intervals.get(metric))
        for metric, value in measured.metrics.items()
        if _is_number(value)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _alike(cells: Mapping[str, Mapping[str, Cell]]) -> list[list[str]]:
    """Splits in groups: those that have a metric in common, directly or through others."""
    groups: list[tuple[list[str], set[str]]] = []
    for split, of in cells.items():
        joined, metrics = [split], set(of)
        for group in [group for group in groups if group[1] & metrics]:
            groups.remove(group)
            joined, metrics = group[0] + joined, group[1] | metrics
        groups.append((joined, metrics))
    return [sorted(splits) for splits, _ in groups]


def _table(
    name: str,
    split: str,
    columns: list[str],
    cells: Sequence[Mapping[str, Cell]],
    *,
    compare: bool,
) -> Table:
    rows = []
    for metric in in_order({metric for column in cells for metric in column}):
        found = [column.get(metric) for column in cells]
        known = named(metric)
        best = _best(found, known.better) if compare else ()
        rows.append(Row(metric, known.title, known.group, known.better, found, best))
    return Table(name, split, columns, rows)


def _best(cells: Sequence[Cell | None], better: int) -> tuple[int, ...]:
    """The columns with the best value; none where all are equal, or neither way is better."""
    values = [cell.value * better for cell in cells if cell is not None]
    if not better or not values or max(values) == min(values):
        return ()
    return tuple(i for i, cell in enumerate(cells) if cell and cell.value * better == max(values))
