"""`capjax evaluate --compare A B`: two runs or two files of captions, figure by figure.

As text, as CSV and as LaTeX. No model, no device.
"""

import argparse
import contextlib
from typing import TYPE_CHECKING

from capjax.errors import UserError

if TYPE_CHECKING:
    from capjax.evaluation.comparison import Comparison
    from capjax.reporting.tables import Table


def run(args: argparse.Namespace) -> None:
    """Prints the comparison, and writes the tables that were asked for."""
    from capjax.reporting.tables import to_csv, to_latex

    found = compare(*args.compare, references=args.references, tokenizer=args.tokenizer)
    table = _table(found, args.compare)
    for path, text in ((args.csv, to_csv), (args.latex, to_latex)):
        if path:
            _write(path, text(table))
    print(text_of(found, args.compare))


def compare(
    first: str, second: str, *, references: str | None = None, tokenizer: str = "auto"
) -> "dict[str, Comparison]":
    """Of each split that both have, its figures.

    Each side is a workdir, whose evaluations/<split>.json and captions/<split>.jsonl are read; one
    such file; or any file of captions. What can be computed from captions is, alike for both.
    Raises `UserError` where there is nothing to compare.
    """
    from capjax.evaluation.comparison import compare_captions, compare_measured
    from capjax.evaluation.java import why_missing
    from capjax.evaluation.meteor import Meteor

    sides = [_read(path, references) for path in (first, second)]
    found: dict[str, Comparison] = {}
    with contextlib.ExitStack() as stack:
        has_captions = sides[0][1].keys() & sides[1][1].keys()
        runs_java = has_captions and not why_missing()
        java = stack.enter_context(Meteor()) if runs_java else None
        for split in dict.fromkeys([*sides[0][0], *sides[0][1]]):
            parts = []
            if all(split in measured for measured, _ in sides):
                a, b = (measured[split] for measured, _ in sides)
                parts.append(compare_measured(a, b))
            if all(split in captions for _, captions in sides):
                a, b = (captions[split] for _, captions in sides)
                parts.append(compare_captions(a, b, tokenizer=tokenizer, java=java))
            rows = {row.metric: row for part in parts for row in part.rows}
            if rows:
                found[split] = parts[-1]._replace(rows=list(rows.values()))
    if not found:
        splits = [sorted({*measured, *captions}) for measured, captions in sides]
        raise UserError(f"nothing to compare: {first} has {splits[0]}, {second} has {splits[1]}")
    return found


def _read(path: str, references: str | None) -> tuple[dict, dict]:
    """(results, captions) by split; of a file the split is called "captions"."""
    from etils import epath

    from capjax.evaluation.caption_files import read_captions
    from capjax.evaluation.measured import read_measured

    root = epath.Path(path).expanduser()
    if not root.exists():
        raise UserError(f"--compare: {path} does not exist; name a workdir or a file")
    if not any((root / name).exists() for name in ("config.json", "evaluations", "captions")):
        if root.suffix == ".json" and '"metrics"' in root.read_text():
            return {"captions": read_measured(root)}, {}
        return {}, {"captions": read_captions(root, references)}
    measured = {file.stem: read_measured(file) for file in sorted(root.glob("evaluations/*.json"))}
    captions = {
        file.stem: read_captions(file, references)
        for file in sorted(root.glob("captions/*.jsonl"))
        if file.stat().length
    }
    return measured, captions


def text_of(found: "dict[str, Comparison]", names: list[str]) -> str:
    """A table for each split, 95 % intervals in brackets, and p of the paired test."""
    lines = [f"first:  {names[0]}", f"second: {names[1]}"]
    for split, (num_items, rows, notes, skipped) in found.items():
        wide = max(len(row.metric) for row in rows)
        how = f", tokens of captions by {notes['tokenizer']}" if notes else ""
        lines += ["", f"{split}, {num_items:,} images{how}"]
        lines.append(f"{'':{wide}}  {'first':24}  {'second':24}  {'second - first':26}  p")
        for row in rows:
            change = row.difference
            cells = [
                _figure(row.first, row.first_interval),
                _figure(row.second, row.second_interval),
                _figure(change.value, change[1:3], "+") if change else "",
            ]
            p_value = (
                f"{change.p_value:.3f}{' *' if change.p_value < 0.05 else ''}" if change else ""
            )
            line = f"{row.metric:{wide}}  {cells[0]:24}  {cells[1]:24}  {cells[2]:26}  {p_value}"
            lines.append(line.rstrip())
        names_found = {row.metric for row in rows}
        lines += [
            f"{name:{wide}}  not measured: {why}"
            for name, why in skipped.items()
            if name not in names_found
        ]
    lines += [
        "",
        "* p < 0.05: paired approximate randomisation, 1,000 swaps; each figure by itself",
    ]
    return "\n".join(lines)


def _figure(value: float, interval: tuple[float, float] | None, sign: str = "") -> str:
    text = f"{value:{sign}.4f}"
    return (
        text if interval is None else f"{text} [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
    )


def _table(found: "dict[str, Comparison]", names: list[str]) -> "Table":
    """All splits as one table of the page's kind."""
    from capjax.reporting.metric_names import in_order, named
    from capjax.reporting.tables import Cell, Row, Table

    lines = []
    for split, compared in found.items():
        by_name = {row.metric: row for row in compared.rows}
        for metric in in_order(by_name):
            row, known = by_name[metric], named(metric)
            change = row.difference
            cells = [Cell(row.first, row.first_interval), Cell(row.second, row.second_interval)]
            tested = (
                [Cell(change.value, change[1:3]), Cell(change.p_value)] if change else [None] * 2
            )
            prefix = f"{split}/" if len(found) > 1 else ""
            title = f"{split}: {known.title}" if len(found) > 1 else known.title
            lines.append(Row(prefix + metric, title, split, known.better, [*cells, *tested]))
    return Table("comparison", "", [*names, "difference", "p"], lines)


def _write(path: str, text: str) -> None:
    from capjax.training.workdir import write_atomic

    try:
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another") from error
    print(f"wrote {path}")
