"""What ends a run that goes wrong, and that a resumed one counts as the whole one does."""

import json
import math

import numpy as np
import pytest

from capjax.errors import UserError
from capjax.training.health import Health, Monitor, NonFiniteLoss
from capjax.training.spikes import Spiked


def see_all(monitor, losses, start=0):
    """What the monitor says of each step, up to the first error."""
    found = []
    for step, loss in enumerate(losses, start + 1):
        values = {"loss": float(loss), "nonfinite": float(not math.isfinite(loss))}
        found.append(monitor.see(step, values, None))
        if found[-1].error:
            break
    return found


def test_so_many_in_a_row_are_borne_and_one_more_ends_the_run():
    health = Health(max_skipped_in_a_row=2, max_skipped_share=1.0)
    nan = math.nan
    found = see_all(Monitor(health), [1, nan, nan, 1, nan, nan, nan, 1])
    assert len(found) == 7
    assert [s.is_wrong for s in found] == [False, True, True, False, True, True, True]
    assert [s.metrics["skipped"] for s in found] == [0, 1, 2, 2, 3, 4, 5]
    assert [bool(s.notes) for s in found] == [s.is_wrong for s in found]
    assert isinstance(found[-1].error, NonFiniteLoss)
    assert "not finite at step 7 (loss=nan, nonfinite=1), 3 steps in a row" in str(found[-1].error)
    assert len(see_all(Monitor(Health(max_skipped_in_a_row=0)), [1, nan, 1])) == 2


def test_a_share_of_the_window_ends_the_run():
    """Every third step for ever: 3 of the last 8 are borne, 4 are not."""
    health = Health(max_skipped_share=0.4, skipped_window=8)
    sparse = [math.nan if step % 3 == 0 else 1.0 for step in range(1, 100)]
    assert len(see_all(Monitor(health), sparse)) == 99
    dense = [*sparse[:19], math.nan, *sparse[20:]]  # of steps 13 to 20: 15, 18, 20
    assert len(see_all(Monitor(health), dense)) == 21  # and 21


def test_a_parameter_that_is_not_finite_ends_the_run_at_once():
    values = {"loss": 1.0, "grad_norm": 1.0, "param_norm": math.inf, "nonfinite": 1.0}
    seen = Monitor(Health()).see(5, values, 4)
    assert "(loss=1, grad_norm=1, param_norm=inf, nonfinite=1); step 4 is kept" in str(seen.error)


def test_a_resumed_run_sees_what_the_whole_one_does():
    rng = np.random.default_rng(0)
    losses = np.where(rng.random(300) < 0.2, np.nan, 1.0)  # 35 % and more from step 200 on
    losses[200:][rng.random(100) < 0.3] = np.nan
    losses = losses.tolist()
    health = Health(max_skipped_in_a_row=4, max_skipped_share=0.4, skipped_window=30)
    whole = see_all(Monitor(health), losses)
    assert 30 < len(whole) < 300
    for cut in range(0, len(whole), 7):
        first = Monitor(health)
        see_all(first, losses[:cut])
        kept = json.loads(json.dumps(first.state()))
        rest = see_all(Monitor(health, kept), losses[cut:], cut)
        assert [str(s) for s in rest] == [str(s) for s in whole[cut:]]


def test_the_counts_of_spikes_and_what_follows_them():
    values = [{"loss": 1.0 + 0.01 * (step % 3)} for step in range(20)] + [{"loss": 2.0}]
    for action in ("none", "warn", "rollback"):
        monitor = Monitor(Health(spike_action=action, spike_window=16))
        *before, last = [monitor.see(step, line, None) for step, line in enumerate(values, 1)]
        assert not any(seen.is_wrong for seen in before)
        assert last.is_wrong == (action != "none")
        assert last.metrics.get("spikes") == {"none": None}.get(action, 1)
        assert len(last.notes) == (action == "warn")
        assert isinstance(last.error, Spiked) == (action == "rollback")
        assert action == "none" or "loss=2 is beyond" in f"{last.notes}{last.error}"
    # Where steps that are not finite would end the run, it goes back as well.
    monitor = Monitor(Health(spike_action="rollback", max_skipped_in_a_row=0))
    assert isinstance(see_all(monitor, [1.0, math.nan])[-1].error, Spiked)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_skipped_in_a_row", -1),
        ("skipped_window", 0),
        ("max_skipped_share", 1.5),
        ("watchdog_s", -1.0),
        ("spike_action", "stop"),
        ("rollback_steps", 0),
    ],
)
def test_what_makes_no_sense_is_refused(field, value):
    with pytest.raises(UserError, match=f"health.{field}={value!r}: (expected|choose)"):
        Health(**{field: value})
