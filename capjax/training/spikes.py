"""Spikes of the loss: finding them, and passing over the batches around them.

After a spike a run may go back to a checkpoint before it and on from there with the batches that
come after it (Chowdhery et al. 2022, "PaLM", section 5.1: the batches alone are not to blame, nor
the parameters, but the two together). What was passed over is in `rollbacks.jsonl` of the workdir,
so that a resumed run passes over the same.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from capjax.errors import UserError
from capjax.training.storage import exists, read_bytes
from capjax.training.workdir import write_atomic

FILE = "rollbacks.jsonl"
_SIGMA = 1.4826  # median absolute deviations in a standard deviation of normal noise
_LEAST_SHARE = 0.01  # of the median: a smaller deviation counts as this, as of a constant


class Spiked(UserError):  # noqa: N818  (what happened)
    """A step after which the run is to go back."""

    def __init__(self, step: int, reason: str):
        self.step, self.reason = step, reason
        super().__init__(f"step {step}: {reason}")


class Rollback(NamedTuple):
    """A spike at `step`: the run went on from `restored_step` without what it had seen since.

    These are the examples of positions `skipped_from` to `skipped_to`, the latter not among them.
    """

    step: int
    restored_step: int
    skipped_from: int
    skipped_to: int
    reason: str

    def offset(self, batch_size: int) -> int:
        """How far the position in the data is ahead of step x batch size from then on."""
        return self.skipped_to - self.restored_step * batch_size


class Detector:
    """Compares each value with the median of those before it.

    A spike is more than `factor` standard deviations above the median of the last `window` values,
    the deviation being estimated from the median absolute one. Nothing is one before there are so
    many. `kept` is what `state` gave.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        window: int,
        factor: float,
        kept: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self._window, self._factor = window, factor
        self._values = {name: [float(x) for x in (kept or {}).get(name, ())] for name in metrics}

    def state(self) -> dict[str, list[float]]:
        """The values of the window by metric, as JSON says them."""
        return {name: list(values) for name, values in self._values.items()}

    def see(self, values: Mapping[str, Any]) -> str:
        """Takes the metrics of one step; what is a spike in them, "" where nothing is."""
        found = []
        for name, before in self._values.items():
            value = float(values.get(name, math.nan))
            if not math.isfinite(value):
                continue
            if len(before) == self._window:
                median = float(np.median(before))
                deviation = _SIGMA * float(np.median(np.abs(np.subtract(before, median))))
                limit = median + self._factor * max(deviation, _LEAST_SHARE * abs(median))
                if value > limit:
                    found.append(f"{name}={value:.4g} is beyond {limit:.4g} (median {median:.4g})")
            before.append(value)
            del before[: -self._window]
        return ", ".join(found)


def read_rollbacks(root: epath.PathLike) -> list[Rollback]:
    """Those of a workdir, in their order."""
    path = epath.Path(root) / FILE
    lines = read_bytes(path).decode().splitlines() if exists(path) else []
    return [Rollback(**json.loads(line)) for line in lines]


def write_rollbacks(root: epath.PathLike, rollbacks: Sequence[Rollback]) -> None:
    """Replaces those of a workdir, whole or not at all."""
    lines = [json.dumps(rollback._asdict()) + "\n" for rollback in rollbacks]
    write_atomic(epath.Path(root) / FILE, "".join(lines))
