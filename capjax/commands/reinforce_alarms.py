"""Alarms of a run: seen in its metrics, said, kept, and acted upon."""

import json
from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat

import jax
import numpy as np
from etils import epath

from capjax.errors import UserError
from capjax.rl.alarms import Alarms, Watch
from capjax.rl.state import ReinforceState
from capjax.training.metrics import read_metrics
from capjax.training.workdir import write_atomic


class AlarmWriter:
    """A writer of metrics that raises alarms; every process has one and sees the same.

    They go to `alarms.jsonl`, an object with `step` and `alarm` a line. A run that goes on reads
    the metrics before its first, so that it raises what the whole run would have.
    """

    def __init__(self, alarms: Alarms, root: epath.Path) -> None:
        self._alarms, self._root = alarms, root
        self._watch, self._seen = Watch(alarms), False
        self._lines: list[dict[str, Any]] = []
        self.rate_factor = 1.0  # to multiply the rate of later updates by, once

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Raises alarms; with action "stop", `UserError`."""
        if not self._seen:
            self._replay(step)
        raised = self._watch.see(step, values)
        self._keep(step, raised)
        for alarm in raised:
            if jax.process_index() == 0:
                print(f"alarm: {alarm}", flush=True)
        if raised and self._alarms.action == "stop":
            raise UserError(
                f"stopped by an alarm at {raised[0]}; what was saved is kept; set alarms.action="
                "warn to go on all the same"
            )
        if raised and self._alarms.action == "lower_rate":
            self.rate_factor *= self._alarms.rate_factor

    def _replay(self, step: int) -> None:
        self._seen = True
        path = self._root / "metrics.jsonl"
        for line in read_metrics(path) if path.exists() else ():
            if line["step"] < step:
                raised = self._watch.see(int(line["step"]), line)
                self._lines += [{"step": int(line["step"]), "alarm": text} for text in raised]

    def _keep(self, step: int, raised: list[str]) -> None:
        if raised and jax.process_index() == 0:
            self._lines += [{"step": step, "alarm": text} for text in raised]
            text = "".join(json.dumps(line) + "\n" for line in self._lines)
            write_atomic(self._root / "alarms.jsonl", text)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""


def lowering(step: Callable, alarms: AlarmWriter) -> Callable:
    """`step`, before which the rate is multiplied by what alarms asked for since the last."""

    def lowered(state: ReinforceState, placed: Any):
        if alarms.rate_factor != 1:
            scale = state.learner.rate_scale
            value = np.float32(jax.device_get(scale) * alarms.rate_factor)
            alarms.rate_factor = 1.0
            learner = state.learner._replace(rate_scale=jax.device_put(value, scale.sharding))
            state = state._replace(learner=learner)
        return step(state, placed)

    return lowered
