"""Where metrics go: `metrics.jsonl` always, TensorBoard and Weights & Biases where installed.

`metrics.jsonl` has one object a line: `step` (updates done), `wall_s` (seconds this run was open,
restarts included), and values by name. Floats are written as the shortest decimal that reads back
as the same float. JSON has no non-finite numbers, so those are the strings "NaN", "Infinity" and
"-Infinity", which `float()` reads; `read_metrics` does.
"""

import functools
import importlib.util
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, SupportsFloat, runtime_checkable

import jax
from etils import epath

from capjax.errors import UserError
from capjax.training.storage import (
    exists,
    is_remote,
    is_transient,
    patiently,
    read_bytes,
    reason,
    warn,
)
from capjax.training.workdir import write_atomic

_REMOTE_EVERY_S = 30.0


@runtime_checkable
class MetricWriter(Protocol):
    """A place for metrics. `flush` returns once what was written survives a kill."""

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class JsonlWriter:
    """Writes `metrics.jsonl`, after trimming what lies beyond `restored_step` (None: all of it).

    Locally every line is appended and flushed at once. A store that cannot append gets the whole
    file anew, at most every 30 s and at `flush`. What cannot be written ends nothing before
    `close`: `report` gets a line when it begins, and it is tried again with the next line.
    """

    def __init__(
        self,
        path: epath.PathLike,
        restored_step: int | None = None,
        report: Callable[[str], None] = warn,
    ):
        self._path = epath.Path(path)
        start_s = trim(self._path, -1 if restored_step is None else restored_step)
        self._zero = time.monotonic() - start_s
        self._report, self._is_behind = report, False
        self._written_at = time.monotonic()
        self._file: io.FileIO | None = None
        if not is_remote(self._path):
            self._file = io.FileIO(self._path, "ab")
        # For a store the whole file, else what is still to be appended.
        whole = self._file is None and exists(self._path)
        self._lines = read_bytes(self._path) if whole else b""

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Adds one line."""
        wall_s = round(time.monotonic() - self._zero, 3)
        line = {"step": step, "wall_s": wall_s} | {k: _to_json(v) for k, v in values.items()}
        self._lines += json.dumps(line, allow_nan=False).encode() + b"\n"
        if self._file is not None or time.monotonic() - self._written_at >= _REMOTE_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Stores the lines kept back, or says why it cannot."""
        try:
            self._store()
        except Exception as error:
            if not isinstance(error, OSError) and not is_transient(error):
                raise
            if not self._is_behind:
                self._report(
                    f"{self._path} not written: {reason(error)}; its lines are kept in memory and "
                    "tried again"
                )
            self._is_behind = True
        else:
            self._is_behind = False

    def _store(self) -> None:
        self._written_at = time.monotonic()
        if self._file is None:
            self._path.write_bytes(self._lines)
            return
        while self._lines:  # a disk that becomes full takes a part of them
            self._lines = self._lines[self._file.write(self._lines) :]

    def close(self) -> None:
        """Flushes and closes the file. Raises `OSError` where lines are lost."""
        try:
            patiently(self._store, f"writing {self._path}")
        finally:
            if self._file is not None:
                self._file.close()


class LastEvaluation:
    """What was measured at the last step that was evaluated, for its checkpoint."""

    def __init__(self) -> None:
        self._step, self._values = -1, {}

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Keeps finite numbers named `eval/...`."""
        found = {name: float(x) for name, x in values.items() if name.startswith("eval/")}
        found = {name: value for name, value in found.items() if math.isfinite(value)}
        self._values = {**(self._values if step == self._step else {}), **found}
        self._step = step

    def at(self, step: int) -> dict[str, float]:
        """What was measured at `step`, by name; empty where nothing was."""
        return dict(self._values) if step == self._step else {}

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class TensorBoardWriter:
    """Writes TensorBoard events; the viewer hides older events beyond `restored_step`."""

    def __init__(self, directory: epath.PathLike, restored_step: int | None = None):
        self._directory = str(directory)
        self._purge_step = 0 if restored_step is None else restored_step + 1

    @functools.cached_property
    def _writer(self):
        # Only with the first value: importing it imports torch where that is installed.
        from tensorboardX import SummaryWriter

        # The suffix keeps a restart within the same second from writing over the file before.
        suffix = f".{self._purge_step}-{os.getpid()}"
        return SummaryWriter(self._directory, purge_step=self._purge_step, filename_suffix=suffix)

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Adds one event a value."""
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def flush(self) -> None:
        """Writes the events to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WandbWriter:
    """Logs to the Weights & Biases run whose id is kept in `workdir/wandb_id`.

    The step is a metric of its own there: the service refuses steps that go back, as a resume does.
    """

    def __init__(self, workdir: epath.Path, project: str, config: Mapping[str, Any]):
        import wandb  # pyrefly: ignore[missing-import]  (an extra)

        id_file = workdir / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else None
        self._run = wandb.init(
            project=project,
            id=run_id,
            resume="allow",
            name=workdir.name,
            config=dict(config),
            dir=None if is_remote(workdir) else str(workdir),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        write_atomic(id_file, self._run.id + "\n")

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Logs one row."""
        self._run.log({"step": step} | {name: float(value) for name, value in values.items()})

    def flush(self) -> None:
        """Does nothing: another process sends the rows."""

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()


def make_writers(
    workdir: epath.PathLike,
    *,
    restored_step: int | None = None,
    tensorboard: bool = True,
    wandb_project: str = "",
    config: Mapping[str, Any] | None = None,
) -> tuple[MetricWriter, ...]:
    """The writers of this process: none but on the first.

    `restored_step` is the step resumed from (None: a fresh start). `tensorboard` takes effect where
    tensorboardX is installed and the workdir is local. Raises `UserError` where `wandb_project` is
    set and wandb is not installed.
    """
    root = epath.Path(workdir)
    if wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"wandb project {wandb_project!r}: wandb is not installed; "
            "pip install 'capjax[wandb]', or leave the project empty"
        )
    if jax.process_index() != 0:
        return ()
    writers: list[MetricWriter] = [JsonlWriter(root / "metrics.jsonl", restored_step)]
    if tensorboard and not is_remote(root) and importlib.util.find_spec("tensorboardX"):
        writers.append(TensorBoardWriter(root / "tensorboard", restored_step))
    if wandb_project:
        writers.append(WandbWriter(root, wandb_project, config or {}))
    return tuple(writers)


def trim(path: epath.PathLike, step: int) -> float:
    """Drops torn lines and lines beyond `step` from a metrics file, in one atomic replacement.

    Returns `wall_s` of the last line kept, 0 where there is none.
    """
    path = epath.Path(path)
    if not exists(path):
        return 0.0
    data = read_bytes(path)
    kept = [(line, values) for line, values in _parse(data.split(b"\n")) if values["step"] <= step]
    trimmed = b"".join(line + b"\n" for line, _ in kept)
    if trimmed != data:
        write_atomic(path, trimmed)
    return float(kept[-1][1].get("wall_s", 0.0)) if kept else 0.0


def read_metrics(path: epath.PathLike) -> list[dict[str, float | int]]:
    """The lines of a metrics file as numbers, without torn ones."""
    return [
        {name: float(v) if isinstance(v, str) else v for name, v in values.items()}
        for _, values in _parse(epath.Path(path).read_bytes().split(b"\n"))
    ]


def _parse(lines: Iterable[bytes]) -> Iterable[tuple[bytes, dict[str, Any]]]:
    """The lines that are whole, with their values."""
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:  # torn: not JSON, or not UTF-8
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            yield line, values


def _to_json(value: SupportsFloat) -> float | int | str:
    if isinstance(value, int):
        return int(value)
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")
