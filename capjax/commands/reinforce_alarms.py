"""Alarms of a run: seen in its metrics, said, kept, and acted upon."""

import json
from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat

import jax
import numpy as np
from etils import epath

from capjax.rl.alarms import Alarms, Watch
from capjax.rl.state import ReinforceState
from capjax.training.metrics import read_metrics
from capjax.training.workdir import write_atomic


class AlarmWriter:
    """A writer of metrics that raises alarms; every process has one and sees the same.

    They go to `alarms.jsonl`, an object with `step` and `alarm` a line. A run that goes on reads
    the metrics before its first, so that it raises what the whole run would have; what was done
    about earlier alarms is in the state.
    """

    def __init__(self, alarms: Alarms, root: epath.Path) -> None:
        self._alarms, self._root = alarms, root
        self._watch, self._seen = Watch(alarms), False
        self._rate_factor, self._reason = 1.0, ""
        self._unwritten: list[dict[str, Any]] = []

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Raises alarms: says them, keeps them, and remembers what is to be done."""
        if not self._seen:
            self._replay(step)
        raised = self._watch.see(step, values)
        if not raised:
            return
        if jax.process_index() == 0:
            self._keep(step, raised)
            for alarm in raised:
                print(f"alarm: {alarm}", flush=True)
        if self._alarms.action == "lower_rate":
            self._rate_factor *= self._alarms.rate_factor
        if self._alarms.action == "stop":
            self._reason = (
                f"stopped by an alarm ({raised[0]}); the state is saved; set alarms.action=warn to "
                "go on all the same"
            )

    def stop(self) -> str:
        """Why the run should stop; "" where it should not."""
        return self._reason

    def settled(self, state: ReinforceState) -> ReinforceState:
        """The state with its rate multiplied by what alarms asked for since the last step."""
        if self._rate_factor == 1:
            return state
        scale = state.learner.rate_scale
        value = np.float32(jax.device_get(scale) * self._rate_factor)
        learner = state.learner._replace(rate_scale=jax.device_put(value, scale.sharding))
        return state._replace(learner=learner)

    def lowering(self, step: Callable) -> Callable:
        """`step`, from whose states the rate is lowered once for each alarm."""

        def lowered(state: ReinforceState, placed: Any):
            state = self.settled(state)
            self._rate_factor = 1.0
            return step(state, placed)

        return lowered

    def _replay(self, step: int) -> None:
        self._seen = True
        path = self._root / "metrics.jsonl"
        for line in read_metrics(path) if path.exists() else ():
            if line["step"] < step:
                self._watch.see(int(line["step"]), line)

    def _keep(self, step: int, raised: list[str]) -> None:
        """Adds to the file; lines of later steps are of a run that was cut.

        A disk that is full must not end a run: they are added with the next ones.
        """
        self._unwritten += [{"step": step, "alarm": text} for text in raised]
        path = self._root / "alarms.jsonl"
        try:
            text = path.read_text() if path.exists() else ""
            kept = [alarm for alarm in map(json.loads, text.splitlines()) if alarm["step"] <= step]
            lines = kept + [alarm for alarm in self._unwritten if alarm not in kept]
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
            self._unwritten = []
        except OSError as error:
            print(f"warning: {path} not written: {error.strerror or error}", flush=True)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""
