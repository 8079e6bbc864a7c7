"""The page of one or several runs, in one HTML file that asks for nothing else.

What each part shows is made in its own file; the script and the style are put inside the page.
"""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from capjax.errors import UserError
from capjax.reporting.curves import curves
from capjax.reporting.gallery import gallery
from capjax.reporting.metric_names import named
from capjax.reporting.over_time import samples
from capjax.reporting.reinforcement import reinforcement
from capjax.reporting.runs import Run, config_differences, read_runs, splits_of, voices
from capjax.reporting.tables import (
    Table,
    guidance_tables,
    result_tables,
    shown,
    skipped_and_notes,
    to_csv,
    to_latex,
)
from capjax.reporting.time_spent import time_spent_of
from capjax.reporting.tradeoff import tradeoff_plots
from capjax.training.workdir import write_atomic

MAX_IMAGES = 1000
FIRST_SPLIT = "val"  # shown first where a run has it
_SCRIPTS = ("charts.js", "gallery.js", "viewer.js")


def write_report(
    workdirs: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    seed: int = 0,
    max_images: int = MAX_IMAGES,
) -> Path:
    """Writes the page and returns its path.

    Args:
      workdirs: of the runs; the first is what the others are compared with.
      output: default: `report.html` in the workdir; of several, `comparison.html` in the first.
      seed: draws the images shown where there are more; it is printed on the page.
      max_images: on the page, of all splits together.

    Raises `UserError` where a workdir holds no run, or a file that cannot be read, or
    `max_images` is negative.
    """
    if max_images < 0:
        raise UserError(f"--images={max_images}: expected 0 or more")
    runs = read_runs(workdirs)
    if output is None:
        output = Path(workdirs[0]) / ("report.html" if len(runs) == 1 else "comparison.html")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("capjax", "reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    page = environment.get_template("page.html.jinja").render(
        title="capjax: " + (_title(runs[0]) if len(runs) == 1 else f"{len(runs)} runs compared"),
        runs=runs,
        style=_inlined("page.css"),
        script=Markup("\n").join(_inlined(name) for name in _SCRIPTS),
        facts=_facts(runs),
        splits=splits_of(runs),
        first_split=_first_split(runs),
        tables=[_exported(table) for table in result_tables(runs)],
        guidance_tables=[_exported(table) for table in guidance_tables(runs)],
        skipped_and_notes=skipped_and_notes(runs),
        plots=tradeoff_plots(runs),
        named=named,
        reinforcement=reinforcement(runs),
        samples=samples(runs[0], max_images) if len(runs) == 1 else [],
        curves=curves(runs),
        data=gallery(voices(runs), seed=seed, max_images=max_images),
        seed=seed,
        time_spent=time_spent_of(runs),
        differences=config_differences(runs),
        as_json=lambda value: json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False),
    )
    # A caption or a path may hold what is not Unicode (half a surrogate pair): shown as "?".
    write_atomic(output, page.encode("utf-8", "replace"))
    return Path(output)


def _title(run: Run) -> str:
    return str(run.config.get("name", run.name))


def _first_split(runs: Sequence[Run]) -> str:
    """`FIRST_SPLIT`, or else the first that there is, of those with captions where any has."""
    splits = sorted({split for run in runs for split in run.captions}) or splits_of(runs)
    return FIRST_SPLIT if FIRST_SPLIT in splits else next(iter(splits), "")


def _inlined(name: str) -> Markup:
    return Markup(resources.files("capjax.reporting").joinpath(name).read_text("utf-8"))


def _exported(table: Table) -> dict[str, Any]:
    """A table with data URLs of its CSV and LaTeX forms."""
    name = "".join(c if c.isalnum() else "-" for c in table.name)
    return {
        "table": table,
        "file": name,
        "csv": "data:text/csv;charset=utf-8," + quote(to_csv(table), errors="replace"),
        "latex": "data:text/plain;charset=utf-8," + quote(to_latex(table), errors="replace"),
    }


def _facts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(name, its value in each run) of what some run's summary says."""
    rows: dict[str, list[str]] = {}
    for number, run in enumerate(runs):
        for name, value in _facts_of(run).items():
            if value is not None:
                rows.setdefault(name, [""] * len(runs))[number] = value
    return list(rows.items())


def _facts_of(run: Run) -> dict[str, str | None]:
    def of(name: str, unit: int | float = 1) -> str | None:
        value = run.summary.get(name)
        return shown(value / unit) if isinstance(value, (int, float)) else value

    def percent(name: str) -> str | None:
        value = run.summary.get(name)
        return None if value is None else f"{value:.1%}"

    best = run.summary.get("best")
    steps = f"{run.metrics[-1]['step']:,}" if run.metrics else None
    return {
        "steps": of("steps") or steps,
        "best step": f"{best['step']:,} ({best['metric']} {best['value']:.4g})" if best else None,
        "examples seen": of("examples_seen"),
        "parameters": of("num_params"),
        "devices": of("devices"),
        "images per second": of("images_per_s"),
        "model GFLOP/s": of("model_flops_per_s", 1e9),
        "MFU": percent("mfu"),
        "waiting for data": percent("data_wait_fraction"),
        "first step after (s)": of("first_step_s"),
        "wall time (min)": of("wall_s", 60),
        "peak memory (GB)": of("peak_rss_bytes", 1e9),
    }
