"""The run page: curves, captions beside held-out pictures, config and device, in one HTML file."""

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from capjax.data.decode import decode_image
from capjax.data.sources import open_source
from capjax.errors import UserError
from capjax.reporting.charts import Series, line_chart
from capjax.training.workdir import write_atomic

TILE_PIXELS = 128
SMOOTHING = 0.8
# Charts of the page, in order: title, what a metric's name must end with, smoothing.
_TRAIN_CHARTS = (
    (
        "Training loss",
        ("train/loss", "train/causal_loss", "train/parallel_loss", "train/contrastive_loss"),
        SMOOTHING,
    ),
    ("Images per second", ("train/images_per_s",), 0.0),
    ("Gradient norm", ("train/grad_norm",), SMOOTHING),
    ("Learning rate", ("train/learning_rate",), 0.0),
)
_EVAL_METRICS = {
    "exact_match": "exact match",
    "unigram_f1": "unigram F1",
    "image_to_text_r1": "image to text R@1",
    "text_to_image_r1": "text to image R@1",
    "loss": "loss (nats a token)",
    "perplexity": "perplexity",
    "parallel_loss": "parallel loss (nats a token)",
    "parallel_perplexity": "parallel perplexity",
    "shuffled_images_loss": "loss with shuffled images",
    "distinct_ratio": "distinct captions",
}


def write_report(
    workdir: str | Path, output: str | Path | None = None, *, seed: int = 0, tiles: int = 24
) -> Path:
    """Writes the page of a run and returns its path (default `workdir/report.html`).

    Args:
      seed: draws the pictures shown; it is printed on the page.
      tiles: pictures shown of each split.

    Raises `UserError` where `workdir` holds no run.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(
            f"workdir={workdir}: no config.json there; give the --workdir of a `capjax train` run"
        )
    config = json.loads((workdir / "config.json").read_text())
    summary_path = workdir / "summary.json"
    summary = json.loads(summary_path.read_text()) if summary_path.is_file() else {}
    metrics = read_metrics(workdir / "metrics.jsonl")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("capjax", "reporting"), autoescape=True, trim_blocks=True
    )
    page = environment.get_template("page.html.jinja").render(
        title=f"capjax: {config.get('name', workdir.name)}",
        subtitle=f"A run of `capjax train` in {workdir.name}.",
        facts=_facts(metrics, summary),
        tables=_table(metrics),
        metrics_note=(
            "At the last evaluation; captions are greedy. Exact match: equal lower-cased strings. "
            "Unigram F1: multisets of words, mean over images. R@1: share of images (texts) whose "
            "own text (image) is nearer than every other of the split."
        ),
        charts=[chart for chart in _charts(metrics) if chart],
        splits=_splits(workdir / "captions", seed, tiles),
        seed=seed,
        config=json.dumps(config, indent=2, sort_keys=True),
        environment=json.dumps(summary, indent=2, sort_keys=True) if summary else "",
    )
    output = workdir / "report.html" if output is None else Path(output)
    write_atomic(output, page)
    return output


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a torn last line (of a run still writing) is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def series_of(metrics: list[dict[str, Any]], name: str, label: str | None = None) -> Series:
    """The values of one metric over the steps where it was logged."""
    points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    return Series(label or name, [step for step, _ in points], [value for _, value in points])


def _charts(metrics: list[dict[str, Any]]) -> list[str]:
    charts = []
    for title, names, smooth in _TRAIN_CHARTS:
        lines = [series_of(metrics, name, name.removeprefix("train/")) for name in names]
        charts.append(line_chart(title, lines, smooth=smooth))
    for suffix, title in _EVAL_METRICS.items():
        if "perplexity" in suffix:  # the exponential of a loss that has its chart
            continue
        lines = [
            series_of(metrics, f"eval/{split}/{suffix}", split) for split in _eval_splits(metrics)
        ]
        charts.append(line_chart(f"Evaluation: {title}", lines))
    return charts


def _eval_splits(metrics: list[dict[str, Any]]) -> list[str]:
    names = {name for line in metrics for name in line if name.startswith("eval/")}
    return sorted({name.split("/")[1] for name in names if name.count("/") >= 2})


def _table(metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The last value of every evaluation metric: a row for each split."""
    last: dict[str, float] = {}
    for line in metrics:
        last |= {name: value for name, value in line.items() if name.startswith("eval/")}
    columns = [m for m in _EVAL_METRICS if any(name.endswith(f"/{m}") for name in last)]
    rows = [
        {
            "split": split,
            "cells": [_number(last.get(f"eval/{split}/{metric}")) for metric in columns],
        }
        for split in _eval_splits(metrics)
    ]
    return {"columns": [_EVAL_METRICS[m] for m in columns], "rows": rows} if rows else None


def _facts(metrics: list[dict[str, Any]], summary: dict[str, Any]) -> list[dict[str, str]]:
    known = {
        "steps": summary.get("steps") or (metrics[-1]["step"] if metrics else None),
        "examples seen": summary.get("examples_seen"),
        "parameters": summary.get("num_params"),
        "devices": summary.get("devices"),
        "images per second": summary.get("images_per_s"),
        "model GFLOP/s": summary["model_flops_per_s"] / 1e9
        if summary.get("model_flops_per_s")
        else None,
        "MFU": summary.get("mfu"),
        "waiting for data": summary.get("data_wait_fraction"),
        "first step after (s)": summary.get("first_step_s"),
        "wall time (min)": summary["wall_s"] / 60 if summary.get("wall_s") else None,
        "peak memory (GB)": summary["peak_rss_bytes"] / 1e9
        if summary.get("peak_rss_bytes")
        else None,
    }
    percent = ("waiting for data", "MFU")
    return [
        {"name": name, "value": f"{value:.1%}" if name in percent else _number(value)}
        for name, value in known.items()
        if value is not None
    ]


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (
        isinstance(value, float) and value.is_integer() and value >= 1000
    ):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _splits(directory: Path, seed: int, tiles: int) -> list[dict[str, Any]]:
    splits = []
    for path in sorted(directory.glob("*.jsonl")) if directory.is_dir() else []:
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if not records:
            continue
        drawn = random.Random(seed).sample(records, min(tiles, len(records)))
        images = _images(drawn)
        exact = sum(record["exact"] for record in records)
        splits.append(
            {
                "name": path.stem,
                "note": (
                    f"{len(records):,} captions at step {records[0]['step']:,}; "
                    f"{exact / len(records):.1%} exact; {len(drawn)} shown."
                ),
                "tiles": [record | {"image": images.get(record["key"])} for record in drawn],
            }
        )
    return splits


def _images(records: list[dict[str, Any]]) -> dict[str, str]:
    """Data URLs of the pictures by key. A source that is gone gives none: the captions remain."""
    found = {}
    for name in {record["source"] for record in records}:
        try:
            source = open_source(name)
        except UserError:
            continue
        for record in records:
            if record["source"] == name and record["index"] < len(source):
                found[record["key"]] = _data_url(source[record["index"]].image)
    return found


def _data_url(image_bytes: bytes) -> str:
    image = Image.fromarray(decode_image(image_bytes))
    image.thumbnail((TILE_PIXELS, TILE_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
