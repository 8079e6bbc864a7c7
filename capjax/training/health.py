"""What a run does about numbers that go wrong: steps that are not finite.

The step itself leaves the state as it was where its loss or gradient is not finite
(`capjax.training.step`). Here it is counted how often that happens, from metrics that every process
has alike; the counts are kept with each checkpoint, so that a resumed run counts as the whole run.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from capjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Health:
    """When a run that goes wrong goes on all the same, and when it ends.

    Attributes:
      max_skipped_in_a_row: a step whose loss or gradient is not finite changes nothing, and the run
        goes on with the next batch; more such steps in a row than this end it. 0: the first does.
      max_skipped_share: of the last `skipped_window` steps; more skipped ones end the run too.
    """

    max_skipped_in_a_row: int = 10
    max_skipped_share: float = 0.1
    skipped_window: int = 200

    def __post_init__(self):
        for name, least in (("max_skipped_in_a_row", 0), ("skipped_window", 1)):
            if getattr(self, name) < least:
                raise UserError(f"health.{name}={getattr(self, name)}: expected at least {least}")
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError(
                f"health.max_skipped_share={self.max_skipped_share}: expected a share, 0 to 1"
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

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON says it."""
        return {"skipped": self._skipped, "in_a_row": self._in_a_row, "recent": self._recent}

    def see(self, step: int, values: Mapping[str, float], saved_step: int | None) -> Seen:
        """Takes the metrics of `step`; `saved_step` is the newest one kept, if any."""
        is_finite = math.isfinite(values["loss"]) and not values.get("nonfinite")
        if is_finite:
            self._in_a_row = 0
            return Seen(False, {"skipped": self._skipped})
        health = self._health
        self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
        window = range(step - health.skipped_window + 1, step + 1)
        self._recent = [s for s in self._recent if s in window] + [step]
        how_often = ""
        if self._in_a_row > 1:
            how_often = f", {self._in_a_row} steps in a row"
        if len(self._recent) > self._in_a_row:
            how_often += f", {len(self._recent)} of the last {health.skipped_window} steps"
        is_over = (
            self._in_a_row > health.max_skipped_in_a_row
            or len(self._recent) > health.max_skipped_share * health.skipped_window
            # No later step would be finite either.
            or not math.isfinite(values.get("param_norm", 0.0))
        )
        return Seen(
            True,
            {"skipped": self._skipped},
            (f"step {step} was skipped: not finite ({_shown(values)}){how_often}",),
            NonFiniteLoss(step, values, saved_step, how_often) if is_over else None,
        )


def _shown(metrics: Mapping[str, float]) -> str:
    names = ("loss", "grad_norm", "param_norm", "nonfinite")
    wrong = [n for n in names[:3] if not math.isfinite(metrics.get(n, 0.0))]
    names = [n for n in names if n in metrics and (n != "param_norm" or n in wrong)]
    return ", ".join(f"{name}={metrics[name]:g}" for name in names)
