"""What a run does about numbers that go wrong: steps that are not finite, and spikes.

The step itself leaves the state as it was where its loss or gradient is not finite
(`capjax.training.step`). Here it is judged what that means for the run, from metrics that every
process has alike; what is counted is kept with each checkpoint, so that a resumed run judges as the
whole run does.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from capjax.errors import UserError
from capjax.training.spikes import Detector, Spiked

SPIKE_ACTIONS = ("none", "warn", "rollback")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Health:
    """When a run that goes wrong goes on all the same, and when it ends.

    Attributes:
      max_skipped_in_a_row: a step whose loss or gradient is not finite changes nothing, and the run
        goes on with the next batch; more such steps in a row than this end it. 0: the first does.
      max_skipped_share: of the last `skipped_window` steps; more skipped ones end the run too.
      spike_action: of a step whose loss or gradient is much too large: "none"; "warn" says it;
        "rollback" goes back to a checkpoint before it, and on with the batches after it
        (`capjax.training.spikes`), also where the run would end for steps that are not finite.
      spike_metrics: what is watched.
      spike_window: a spike is above the median of so many last values
      spike_factor: by more than so many standard deviations, which are estimated robustly.
      rollback_steps: the checkpoint that the run goes back to is so many steps before the spike,
        or more.
      max_rollbacks: one more ends the run.
      watchdog_s: so long without a step, and the process ends (`capjax.training.watchdog`); 0: off.
      watchdog_slow_s: the same of starting, compiling, one evaluation, one save.
      memory_share: of the host's memory; a warning says where the process and its workers hold
        more (`capjax.training.machine`); 0: off.
      data_wait_share: of the time; so does one where more goes into waiting for data; 0: off.
    """

    max_skipped_in_a_row: int = 10
    max_skipped_share: float = 0.1
    skipped_window: int = 200
    spike_action: str = "none"
    spike_metrics: tuple[str, ...] = ("loss", "grad_norm")
    spike_window: int = 128
    spike_factor: float = 6.0
    rollback_steps: int = 10
    max_rollbacks: int = 3
    watchdog_s: float = 1800.0
    watchdog_slow_s: float = 21600.0
    memory_share: float = 0.9
    data_wait_share: float = 0.25

    def __post_init__(self):
        for name, least in (
            ("max_skipped_in_a_row", 0),
            ("skipped_window", 1),
            ("spike_window", 2),
            ("spike_factor", 0),
            ("rollback_steps", 1),
            ("max_rollbacks", 0),
            ("watchdog_s", 0),
            ("watchdog_slow_s", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"health.{name}={getattr(self, name)}: expected at least {least}")
        for name in ("max_skipped_share", "memory_share", "data_wait_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"health.{name}={getattr(self, name)}: expected a share, 0 to 1")
        if self.spike_action not in SPIKE_ACTIONS:
            raise UserError(
                f"health.spike_action={self.spike_action!r}: choose one of "
                f"{', '.join(SPIKE_ACTIONS)}"
            )


class NonFiniteLoss(UserError):  # noqa: N818  (what happened, not a slip of the program)
    """Too many steps were not finite, `step` the last; `saved_step` is the last one kept."""

    def __init__(
        self, step: int, metrics: Mapping[str, float], saved_step: int | None, how_often: str = ""
    ):
        self.step, self.saved_step = step, saved_step
        kept = "nothing was saved" if saved_step is None else f"step {saved_step} is kept"
        super().__init__(
            f"training is not finite at step {step} ({_shown(metrics)}){how_often}; {kept}; "
            "lower optimizer.learning_rate or optimizer.grad_clip_norm, in another --workdir"
        )


class Seen(NamedTuple):
    """What is to be done about one step.

    is_wrong: its metrics are written, whether they are due or not.
    metrics: more of them; notes: lines to say; error: to be raised, after both.
    """

    is_wrong: bool
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()
    error: UserError | None = None


class Monitor:
    """Looks at the metrics of every step, in their order.

    `kept` is what `state` gave when the checkpoint was saved from which the run goes on.
    """

    def __init__(self, health: Health, kept: Mapping[str, Any] | None = None) -> None:
        kept = kept or {}
        self._health = health
        self._skipped = int(kept.get("skipped", 0))
        self._in_a_row = int(kept.get("in_a_row", 0))
        self._recent = [int(step) for step in kept.get("recent", ())]  # skipped, of the window
        self._spikes = int(kept.get("spikes", 0))
        metrics = () if health.spike_action == "none" else health.spike_metrics
        window, factor = health.spike_window, health.spike_factor
        self._detector = Detector(metrics, window, factor, kept.get("window"))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON says it."""
        return {
            "skipped": self._skipped,
            "in_a_row": self._in_a_row,
            "recent": self._recent,
            "spikes": self._spikes,
            "window": self._detector.state(),
        }

    def see(self, step: int, values: Mapping[str, float], saved_step: int | None) -> Seen:
        """Takes the metrics of `step`; `saved_step` is the newest one kept, if any."""
        is_finite = math.isfinite(values["loss"]) and not values.get("nonfinite")
        judged = self._finite(step, values) if is_finite else self._wrong(step, values, saved_step)
        counts: dict[str, float] = {"skipped": self._skipped}
        if self._health.spike_action != "none":
            counts["spikes"] = self._spikes
        return judged._replace(metrics=counts)

    def _finite(self, step: int, values: Mapping[str, float]) -> Seen:
        self._in_a_row = 0
        reason = self._detector.see(values)
        if not reason:
            return Seen(False, {})
        self._spikes += 1
        if self._health.spike_action == "rollback":
            return Seen(True, {}, error=Spiked(step, reason))
        return Seen(True, {}, (f"step {step} is a spike: {reason}",))

    def _wrong(self, step: int, values: Mapping[str, float], saved_step: int | None) -> Seen:
        health = self._health
        self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
        window = range(step - health.skipped_window + 1, step + 1)
        self._recent = [s for s in self._recent if s in window] + [step]
        how_often = ""
        if self._in_a_row > 1:
            how_often = f", {self._in_a_row} steps in a row"
        if len(self._recent) > self._in_a_row:
            how_often += f", {len(self._recent)} of the last {health.skipped_window} steps"
        shown = f"not finite ({_shown(values)}){how_often}"
        note = f"step {step} was skipped: {shown}"
        is_over = (
            self._in_a_row > health.max_skipped_in_a_row
            or len(self._recent) > health.max_skipped_share * health.skipped_window
            # No later step would be finite either.
            or not math.isfinite(values.get("param_norm", 0.0))
        )
        if not is_over:
            return Seen(True, {}, (note,))
        if health.spike_action == "rollback":
            return Seen(True, {}, (note,), Spiked(step, shown))
        return Seen(True, {}, (note,), NonFiniteLoss(step, values, saved_step, how_often))


def _shown(metrics: Mapping[str, float]) -> str:
    names = ("loss", "grad_norm", "param_norm", "nonfinite")
    wrong = [n for n in names[:3] if not math.isfinite(metrics.get(n, 0.0))]
    names = [n for n in names if n in metrics and (n != "param_norm" or n in wrong)]
    return ", ".join(f"{name}={metrics[name]:g}" for name in names)
