"""The tables and plots of docs/finetuning.md, from the runs it names.

    python tools/finetuning_tables.py arms --split=composition 'start=runs/vague' \
        'self-retrieval=runs/sr_0,runs/sr_1,runs/sr_2' 'CIDEr-D=runs/cider_0,runs/cider_1'
    python tools/finetuning_tables.py guidance --split=composition 'dropout 0.5=runs/guidance'
    python tools/finetuning_tables.py curves --metrics=train/reward,eval/composition/rd100_r1 \
        --output=docs/hacking.svg 'no divergence=runs/nokl'

An arm is a name and its runs, one a seed. `arms` prints a row of a Markdown table for each, mean
and standard deviation over the seeds where there are several; `guidance` one for each scale that
`capjax evaluate --guidance_scales` measured, and with --output draws them. `curves` draws metrics
of `metrics.jsonl` over steps, one chart each, side by side.
"""

import argparse
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from capjax.reporting.axes import HEIGHT, WIDTH
from capjax.reporting.charts import Mark, Series, line_chart
from capjax.reporting.metric_names import named
from capjax.reporting.runs import Run, guidance_scale, read_runs, split_of

COLUMNS = {
    "recall": "mention_recall",
    "precision": "mention_precision",
    "exact match": "exact_match",
    "CIDEr-D": "cider_d",
    "R@1 among 100": "rd100_r1",
    "in bags of 7": "bags_7_r1",
    "words": "num_words",
    "distinct": "distinct_ratio",
}
# Those of the page, light: an image has no page to follow.
COLOURS = ("#2563eb", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#8f7200", "#c2255c", "#495057")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#5c6570}.name{font-weight:600;fill:#1c1f24}"
    ".grid{stroke:#e1e4ea}.line{fill:none;stroke-width:1.8}.raw{fill:none;opacity:.25}"
    ".mark{fill:none;stroke:#c92a2a}"
    + "".join(
        f".line.c{i},.raw.c{i},.mark.c{i}{{stroke:{colour}}}.dot.c{i},.own.c{i}{{fill:{colour}}}"
        for i, colour in enumerate(COLOURS)
    )
)


def main() -> None:
    """Prints or draws what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("arms", "guidance", "curves"))
    parser.add_argument("arms", nargs="+", metavar="NAME=RUN[,RUN...]")
    parser.add_argument("--split", default="composition")
    parser.add_argument("--metrics", default=",".join(COLUMNS.values()))
    parser.add_argument("--columns", default=2, type=int, help="charts beside each other")
    parser.add_argument("--until", type=int, help="the last step that is drawn")
    parser.add_argument("--output", help="an .svg")
    args = parser.parse_args()
    arms = {}
    for text in args.arms:
        name, _, paths = text.partition("=")
        arms[name] = read_runs([Path(path) for path in paths.split(",")])
    metrics = args.metrics.split(",")
    if args.what == "arms":
        print_table("", {name: [_final(runs, args.split)] for name, runs in arms.items()}, metrics)
    elif args.what == "guidance":
        swept = {name: _swept(runs[0], args.split) for name, runs in arms.items()}
        for name, points in swept.items():
            rows = {f"{scale:g}": [[values]] for scale, values in points}
            print_table(name, rows, metrics)
        if args.output:
            lines = {
                named(metric).title: [
                    Series(name, [s for s, _ in points], [v[metric] for _, v in points])
                    for name, points in swept.items()
                ]
                for metric in metrics
            }
            draw(args.output, lines, "guidance scale", args.columns)
    else:
        lines = {
            _title(metric): [_curve(n, r[0], metric, args.until) for n, r in arms.items()]
            for metric in metrics
        }
        marks = [
            Mark(step, "alarm", text, number)
            for number, runs in enumerate(arms.values())
            for step, text in runs[0].alarms
            if args.until is None or step <= args.until
        ]
        draw(args.output, lines, "step", args.columns, marks)


def print_table(
    title: str, rows: dict[str, list[list[dict[str, float]]]], metrics: Sequence[str]
) -> None:
    """Markdown: a row a name, of each metric the mean and deviation over its runs."""
    names = {metric: name for name, metric in COLUMNS.items()}
    print("|".join(["", title, *(names.get(m, named(m).title) for m in metrics), ""]))
    print("|---" * (len(metrics) + 1) + "|")
    for name, [runs] in rows.items():
        print("|".join(["", name, *(_cell([r[m] for r in runs if m in r]) for m in metrics), ""]))


def draw(
    path: str,
    charts: dict[str, list[Series]],
    x_label: str,
    columns: int,
    marks: Sequence[Mark] = (),
) -> None:
    """Writes one SVG of line charts beside and below each other, a legend on top."""
    parts, top = [], 30
    for number, (title, series) in enumerate(charts.items()):
        figure = line_chart(title, series, x_label=x_label, marks=marks)
        found = re.search(r"<svg [^>]*?data-chart='[^']*'>(.*?)</svg>", figure, re.DOTALL)
        x, y = number % columns * WIDTH, top + number // columns * (HEIGHT + 34)
        inside = found[1] if found else ""
        parts.append(
            f'<g transform="translate({x},{y})"><text class="name" x="50" y="14">{title}</text>'
            f'<g transform="translate(0,16)">{inside}</g></g>'
        )
    legend, x = [], 50
    for number, line in enumerate(next(iter(charts.values()))):
        legend.append(f'<rect class="own c{number}" x="{x}" y="8" width="12" height="12"/>')
        legend.append(f'<text x="{x + 17}" y="18">{line.name}</text>')
        x += 40 + 7 * len(line.name)
    rows = -(-len(charts) // columns)
    width, height = columns * WIDTH, top + rows * (HEIGHT + 34)
    Path(path).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(legend)}{''.join(parts)}</svg>\n"
    )


def _final(runs: Sequence[Run], split: str) -> list[dict[str, float]]:
    return [run.evaluations[split].metrics for run in runs if split in run.evaluations]


def _swept(run: Run, split: str) -> list[tuple[float, dict[str, float]]]:
    found = [
        (guidance_scale(measured) or 1.0, measured.metrics)
        for name, measured in run.evaluations.items()
        if split_of(name) == split and (name == split or guidance_scale(measured) is not None)
    ]
    return sorted(found, key=lambda pair: pair[0])


def _title(metric: str) -> str:
    return named(metric.split("/")[-1]).title.replace("_", " ")


def _curve(name: str, run: Run, metric: str, until: int | None) -> Series:
    points = [(line["step"], line[metric]) for line in run.metrics if metric in line]
    points = [(step, value) for step, value in points if until is None or step <= until]
    return Series(name, [x for x, _ in points], [y for _, y in points])


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    text = f"{mean:.2f}" if mean >= 1 else f"{mean:.3f}".removeprefix("0")
    if len(values) == 1:
        return text
    spread = statistics.stdev(values)
    return f"{text} ± {f'{spread:.2f}' if mean >= 1 else f'{spread:.3f}'.removeprefix('0')}"


if __name__ == "__main__":
    main()
