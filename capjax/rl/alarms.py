"""What is watched while a captioner learns from rewards: signs that it pleases them alone.

A reward is a stand-in. It is hacked where it rises while a judge that is no part of it does not
(Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization"), and before that captions often
grow long, repeat themselves, become the same for all images, or far from what was learnt before.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import SupportsFloat

from capjax.errors import UserError

ACTIONS = ("warn", "stop", "lower_rate")
RECENT = 10  # logged rewards whose mean is compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alarms:
    """When to raise an alarm, and what then.

    Attributes:
      judge_metric: of the splits' evaluation, made by a judge that is not the reward. Evaluations
        of as many images are compared: that at the end of a run may be of more.
      window: evaluations over which the reward must have risen, and the judge not.
      min_judge_gain: a judge that gained no more than this over the window counts as not risen.
      max_kl: nats a caption from the reference; 0: not watched.
      max_length_ratio: of tokens a caption to those at the first logged step; 0: not watched.
      max_repetition: the share of pairs of tokens that a caption has had before; 0: not watched.
      min_distinct_ratio: distinct captions of a split over their number, relative to that of the
        first evaluation; 0: not watched.
      action: "warn" says it; "stop" ends the run, what was saved is kept; "lower_rate" multiplies
        every later update by `rate_factor`.
    """

    judge_metric: str = "rd100_r1"
    window: int = 3
    min_judge_gain: float = 0.0
    max_kl: float = 0.0
    max_length_ratio: float = 2.0
    max_repetition: float = 0.3
    min_distinct_ratio: float = 0.5
    action: str = "warn"
    rate_factor: float = 0.5

    def __post_init__(self):
        if self.action not in ACTIONS:
            raise UserError(f"alarms.action={self.action!r}: choose one of {', '.join(ACTIONS)}")
        if self.window < 1:
            raise UserError(f"alarms.window={self.window}: expected at least 1 evaluation")
        if not 0 < self.rate_factor < 1:
            raise UserError(f"alarms.rate_factor={self.rate_factor}: expected between 0 and 1")


class Watch:
    """Raises alarms from the metrics of a run, in their order; the same for the same metrics."""

    def __init__(self, alarms: Alarms) -> None:
        self._alarms = alarms
        self._rewards: list[float] = []
        # By metric and number of images: the last evaluation of a run is often of more of them.
        self._points: dict[tuple[str, float], list[tuple[float, float]]] = defaultdict(list)
        self._first: dict[tuple[str, float], float] = {}
        self._raised: set[str] = set()  # each is raised once until it has passed

    def see(self, step: int, values: Mapping[str, SupportsFloat]) -> list[str]:
        """Takes one line of metrics; the alarms that it raises, in words."""
        found = {name: float(value) for name, value in values.items()}
        if math.isfinite(reward := found.get("train/reward", math.nan)):
            self._rewards.append(reward)
        reasons: dict[str, str] = {}
        for name, value in found.items():
            num_images = found.get(f"{name.rpartition('/')[0]}/num_images", 0.0)
            reasons[name] = self._reason(name, value, num_images)
        raised = {name for name, reason in reasons.items() if reason}
        new = [f"step {step}: {reasons[name]}" for name in sorted(raised - self._raised)]
        self._raised = (self._raised - reasons.keys()) | raised
        return new

    def _reason(self, name: str, value: float, num_images: float) -> str:
        """Why a metric of this value is alarming; "" where it is not."""
        alarms, metric = self._alarms, name.rpartition("/")[2]
        if name.startswith("eval/") and metric == alarms.judge_metric:
            return self._hacked(name, value, num_images)
        if name == "train/kl" and 0 < alarms.max_kl < value:
            return f"captions are {value:.3g} nats from the reference's, beyond {alarms.max_kl:g}"
        if name == "train/repetition" and 0 < alarms.max_repetition < value:
            return f"{value:.0%} of the pairs of tokens in captions are repeated"
        if name == "train/caption_tokens" and alarms.max_length_ratio:
            first = self._first.setdefault((name, num_images), value)
            if value > alarms.max_length_ratio * first:
                return f"captions have {value:.1f} tokens, {first:.1f} at first"
        if name.startswith("eval/") and metric == "distinct_ratio" and alarms.min_distinct_ratio:
            first = self._first.setdefault((name, num_images), value)
            if value < alarms.min_distinct_ratio * first:
                return f"{name} is {value:.0%}, {first:.0%} at first: many images, one caption"
        return ""

    def _hacked(self, name: str, value: float, num_images: float) -> str:
        """Compares the judge and the mean of recent rewards with those `window` evaluations ago."""
        points, window = self._points[name, num_images], self._alarms.window
        recent = self._rewards[-RECENT:]
        # Before the first step there is no reward to compare with.
        points.append((sum(recent) / len(recent) if recent else math.nan, value))
        if len(points) <= window:
            return ""
        (reward_then, judge_then), (reward_now, judge_now) = points[-1 - window], points[-1]
        has_risen = reward_now > reward_then
        if not has_risen or judge_now > judge_then + self._alarms.min_judge_gain:
            return ""
        return (
            f"the reward rose from {reward_then:.4g} to {reward_now:.4g} in {window} evaluations, "
            f"but {name} went from {judge_then:.4g} to {judge_now:.4g}: captions please the reward "
            "and not the judge"
        )
