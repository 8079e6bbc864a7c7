"""What `capjax train`, `reinforce` and `evaluate` left in a workdir, read for a page."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capjax.errors import UserError
from capjax.evaluation.attention import WordMaps
from capjax.evaluation.measured import Measured, read_measured
from capjax.evaluation.over_time import read_over_time
from capjax.training import goodput

# What may be of an earlier checkpoint: the fields of a run, and where their files are.
_FILES = {
    "evaluations": "evaluations/{}.json",
    "captions": "captions/{}.jsonl",
    "guided": "captions/guided/{}.jsonl",
}


class Run(NamedTuple):
    """One workdir. Each mapping is empty where the run has no such files."""

    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]  # the lines of metrics.jsonl
    evaluations: dict[str, Measured]  # by the name of the file in evaluations/
    captions: dict[str, list[dict[str, Any]]]  # by split
    guided: dict[str, list[dict[str, Any]]]  # by split and scale: "val@2"
    over_time: dict[str, list[dict[str, Any]]]  # by split: the same images at several steps
    alarms: list[tuple[int, str]]  # step, what was alarming
    time_spent: goodput.TimeSpent | None
    attention: dict[str, dict[str, WordMaps]]  # by split and key
    steps: dict[str, int]  # by split: of the checkpoint that all the above is of, where noted
    left_out: list[str]  # files of another checkpoint than that, with their steps


def read_runs(workdirs: Sequence[str | Path]) -> list[Run]:
    """The runs in the order given, each once, named by the least of their paths that tells apart.

    Raises `UserError` where a directory holds no run, or a file that cannot be read.
    """
    paths = list(dict.fromkeys(Path(workdir).expanduser().resolve() for workdir in workdirs))
    if not paths:
        raise UserError("no --workdir: give the directory of a `capjax train` run")
    return [_read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def split_of(evaluation: str) -> str:
    """The split of evaluations/NAME.json: NAME up to an "@" (`val@2.0` is `val`, guided)."""
    return evaluation.partition("@")[0]


def evaluations_of(run: Run, split: str) -> list[Measured]:
    """What was measured of a split: its own file, then those NAME@... that are not guided."""
    return [
        measured
        for name, measured in sorted(run.evaluations.items())
        if name == split or (split_of(name) == split and guidance_scale(measured) is None)
    ]


def guidance_scale(measured: Measured) -> float | None:
    """The scale that the captions of an evaluation were guided with, where it is noted."""
    scale = measured.notes.get("guidance_scale")
    return float(scale) if isinstance(scale, (int, float)) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, or `alarms.jsonl`; a torn one (of a run still writing) is
    left out.
    """
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def last_evaluation(run: Run) -> dict[str, dict[str, float]]:
    """The newest logged value of every `eval/<split>/<metric>`: by split, then by metric.

    Of the step that the split's files are of, where that is known.
    """
    found: dict[str, dict[str, float]] = {}
    for line in run.metrics:
        for name, value in line.items():
            if name.startswith("eval/") and name.count("/") >= 2 and value is not None:
                _, split, metric = name.split("/", 2)
                if line["step"] == run.steps.get(split, line["step"]):
                    found.setdefault(split, {})[metric] = value
    return found


def splits_of(runs: Sequence[Run]) -> list[str]:
    """Every split that any of the runs was evaluated on, in alphabetical order."""
    found: set[str] = set()
    for run in runs:
        found |= last_evaluation(run).keys() | run.captions.keys()
        found |= {split_of(name) for name in run.evaluations}
    return sorted(found)


def voices(runs: Sequence[Run]) -> list[Run]:
    """The runs; after them what each says with guidance, a scale as if it were another run."""
    found = list(runs)
    for run in runs:
        scales: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for name, records in run.guided.items():
            split, _, scale = name.partition("@")
            scales.setdefault(scale, {})[split] = records
        for scale, captions in sorted(scales.items(), key=lambda pair: _as_number(pair[0])):
            name = f"guidance {scale}" if len(runs) == 1 else f"{run.name}, guidance {scale}"
            evaluations = {
                split: run.evaluations[f"{split}@{scale}"]
                for split in captions
                if f"{split}@{scale}" in run.evaluations
            }
            found.append(
                run._replace(name=name, captions=captions, evaluations=evaluations, attention={})
            )
    return found


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The fields in which the runs' configs differ, with the value of each run ("" for none)."""
    flat = [_flat(run.config) for run in runs]
    fields = sorted({field for config in flat for field in config})
    rows = [(field, [config.get(field, "") for config in flat]) for field in fields]
    return [(field, values) for field, values in rows if len(set(values)) > 1]


def _read_run(path: Path, name: str) -> Run:
    if not (path / "config.json").is_file():
        raise UserError(
            f"workdir={path}: no config.json there; give the --workdir of a `capjax train` run"
        )
    run = Run(
        name=name,
        config=_read_json(path / "config.json"),
        summary=_read_json(path / "summary.json") if (path / "summary.json").is_file() else {},
        metrics=read_metrics(path / "metrics.jsonl"),
        evaluations={
            file.stem: read_measured(file) for file in sorted(path.glob("evaluations/*.json"))
        },
        captions=_read_captions(path / "captions"),
        guided=_read_captions(path / "captions" / "guided"),
        over_time={
            file.stem: lines
            for file in sorted(path.glob("captions/over_time/*.jsonl"))
            if (lines := read_over_time(file))
        },
        alarms=_read_alarms(path / "alarms.jsonl"),
        time_spent=_read_time_spent(path / goodput.FILE),
        attention={file.stem: _read_attention(file) for file in path.glob("attention/*.json")},
        steps={},
        left_out=[],
    )
    return _of_one_step(run)


def _of_one_step(run: Run) -> Run:
    """A run without the files of a split that are of another checkpoint than its own are.

    Its own are evaluations/<split>.json and captions/<split>.jsonl; if these differ, the newer
    counts. A file that notes no step is kept.
    """
    noted: dict[tuple[str, str], Any] = {
        ("evaluations", name): measured.notes.get("step")
        for name, measured in run.evaluations.items()
    }
    for field in ("captions", "guided"):
        noted |= {(field, name): of[0].get("step") for name, of in getattr(run, field).items()}
    known = {file: step for file, step in noted.items() if isinstance(step, int)}
    candidates: dict[str, list[tuple[bool, int]]] = {}
    for (_, name), step in known.items():
        split = split_of(name)
        candidates.setdefault(split, []).append((name == split, step))
    steps = {split: max(of)[1] for split, of in candidates.items()}
    other = {file: step for file, step in known.items() if step != steps[split_of(file[1])]}

    def kept(field: str) -> dict[str, Any]:
        return {name: of for name, of in getattr(run, field).items() if (field, name) not in other}

    return run._replace(
        steps=steps,
        left_out=[
            f"{_FILES[field].format(name)} (step {step}, not {steps[split_of(name)]})"
            for (field, name), step in other.items()
        ],
        evaluations=kept("evaluations"),
        captions=kept("captions"),
        guided=kept("guided"),
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error}); write it again") from error


def _read_captions(directory: Path) -> dict[str, list[dict[str, Any]]]:
    files = {file.stem: _read_records(file) for file in sorted(directory.glob("*.jsonl"))}
    return {name: records for name, records in files.items() if records}


def _read_records(path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            records.append(record | {"key": str(record["key"]), "caption": str(record["caption"])})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: not an object with `key` and `caption` "
                f"({type(error).__name__}: {error}); caption the split again"
            ) from error
    return records


def _read_alarms(path: Path) -> list[tuple[int, str]]:
    lines = [line for line in read_metrics(path) if "alarm" in line]
    return [
        (line["step"], str(line["alarm"]).removeprefix(f"step {line['step']}: ")) for line in lines
    ]


def _read_time_spent(path: Path) -> goodput.TimeSpent | None:
    accounts = goodput.read_accounts(path)
    return goodput.time_spent(accounts) if accounts else None


def _read_attention(path: Path) -> dict[str, WordMaps]:
    found = {}
    for key, value in _read_json(path).items():
        try:
            words, (height, width) = value["words"], value["grid"]
            weights = np.array(value["weights"], np.uint8).reshape(len(words), height * width)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{path}: {key!r}: expected words, grid [h, w], and h * w weights of 0..255 a word "
                f"({type(error).__name__}: {error}); write the file again"
            ) from error
        found[key] = WordMaps(words, (height, width), weights)
    return found


def _as_number(scale: str) -> float:
    try:
        return float(scale)
    except ValueError:
        return math.inf  # not a scale: last


def _names(paths: Sequence[Path]) -> list[str]:
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    fields = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            fields |= _flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = json.dumps(value, ensure_ascii=False)
    return fields
