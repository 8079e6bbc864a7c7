"""Which checkpoints are kept: the newest, every so many steps, and those that measured best.

How good a checkpoint is stands in its own metadata: `save` is given what was measured of the state
(`extra["metrics"]`). So the choice is the same after a kill, a resume or a rollback, and another
metric may be chosen at any time.
"""

import contextlib
import dataclasses
import math
import os
from typing import Any

from etils import epath

from capjax.checkpoint.directory import delete, find_steps, list_steps, step_directory
from capjax.checkpoint.files import Damage, read_metadata
from capjax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Keep:
    """What outlives the next save.

    keep: so many of the newest.
    keep_every_steps: all whose step is a multiple of it; 0: none.
    best_metric: such as "eval/val/cider"; "": none is kept for what it measured.
    best_mode: "max" or "min", what is better.
    keep_best: so many of the best; of equals the earliest.
    """

    keep: int = 3
    keep_every_steps: int = 0
    best_metric: str = ""
    best_mode: str = "max"
    keep_best: int = 1

    def __post_init__(self) -> None:
        for name, least in (("keep", 1), ("keep_every_steps", 0), ("keep_best", 1)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"checkpoint.{name}={value}: expected at least {least}")
        if self.best_mode not in ("max", "min"):
            raise UserError(f"checkpoint.best_mode={self.best_mode}: expected max or min")

    def at_most(self, last_step: int) -> int:
        """How many checkpoints a run of so many steps keeps."""
        multiples = last_step // self.keep_every_steps if self.keep_every_steps else 0
        return self.keep + multiples + (self.keep_best if self.best_metric else 0)

    def ranked(self, directory: epath.Path) -> list[tuple[int, float]]:
        """(step, value) of the checkpoints that were measured, the best first."""
        found = []
        for step in list_steps(directory) if self.best_metric else ():
            with contextlib.suppress(Damage):
                value = _metrics(directory, step).get(self.best_metric)
                if value is not None and math.isfinite(value):
                    found.append((step, float(value)))
        sign = 1 if self.best_mode == "min" else -1
        return sorted(found, key=lambda pair: (sign * pair[1], pair[0]))

    def prune(self, directory: epath.Path) -> None:
        """Deletes what is not to be kept. What cannot be deleted is left for the next time."""
        best = {step for step, _ in self.ranked(directory)[: self.keep_best]}
        for step in list_steps(directory)[: -self.keep]:
            every = self.keep_every_steps
            if step not in best and not (every and step % every == 0):
                with contextlib.suppress(OSError):
                    delete(directory, step)

    def unknown(self, metrics: dict[str, Any]) -> str:
        """What to say where a state was measured, and not by `best_metric`; "" if all is well."""
        if not self.best_metric or not metrics or self.best_metric in metrics:
            return ""
        hint = did_you_mean(self.best_metric, metrics)
        return (
            f"checkpoint.best_metric={self.best_metric} was not measured{hint}; there are "
            f"{', '.join(sorted(metrics))}; no checkpoint is kept as the best until it is changed"
        )


DEFAULT = Keep()


def _metrics(directory: epath.Path, step: int) -> dict[str, float]:
    return read_metadata(step_directory(directory, step))["extra"].get("metrics", {})


def best_step(path: str | os.PathLike) -> int:
    """The step that measured best, of a workdir or its `checkpoints`, as its run chose it.

    Raises `UserError` where the run kept none for what it measured.
    """
    directory, steps = find_steps(path)
    try:
        config = read_metadata(step_directory(directory, steps[-1]))["config"]
    except Damage as damage:
        raise UserError(
            f"--step=best: the checkpoint of step {steps[-1]} in {directory} is damaged "
            f"({damage}); name a step of {steps}"
        ) from None
    section = config.get("checkpoint", {})
    names = {field.name for field in dataclasses.fields(Keep)}
    keep = Keep(**{name: value for name, value in section.items() if name in names})
    ranked = keep.ranked(directory)
    if not ranked:
        why = f"none has {keep.best_metric}" if keep.best_metric else "its run set no best_metric"
        raise UserError(f"--step=best: {directory}: {why}; name a step of {steps}")
    return ranked[0][0]
