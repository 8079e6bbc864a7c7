"""Spikes against their definition, on losses as they are: noisy, falling, with a heavy tail."""

import json
import statistics

import numpy as np
import pytest

from capjax.training.spikes import Detector, Rollback, read_rollbacks, write_rollbacks


def spikes(losses, window=128, factor=6.0):
    detector = Detector(("loss",), window, factor)
    return [step for step, loss in enumerate(losses, 1) if detector.see({"loss": loss})]


def falling(steps=10_000, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    return 2 + 4 / (1 + np.arange(steps) / 300) + rng.normal(0, noise, steps)


def test_noise_is_none_and_a_planted_one_is_found():
    losses = falling()
    assert spikes(losses) == []
    losses[[5000, 5001, 9000]] += 12 * 0.05
    losses[150] += 12 * 0.05  # while the loss falls steeply, its own fall is the deviation
    assert spikes(losses) == [5001, 5002, 9001]
    assert spikes([1.0] * 200 + [1.05, 1.07]) == [202]  # of a constant: beyond 6 %
    assert spikes([1.0] * 127 + [9.0]) == []  # too few to compare with


def test_the_limit_is_the_median_and_six_deviations():
    rng = np.random.default_rng(1)
    before = rng.exponential(1.0, 21).tolist()
    median = statistics.median(before)
    limit = median + 6 * 1.4826 * statistics.median(abs(x - median) for x in before)
    for value, is_spike in ((limit * 1.0001, True), (limit * 0.9999, False)):
        detector = Detector(("loss", "grad_norm"), 21, 6.0)
        for x in before:
            assert not detector.see({"loss": 1.0, "grad_norm": x})
        found = detector.see({"loss": 1.0, "grad_norm": value})
        assert bool(found) == is_spike and found.startswith("grad_norm=" * is_spike)


def test_a_new_level_is_none_for_long_and_what_is_not_finite_is_passed_over():
    losses = falling()[9000:]
    assert 55 <= len(spikes([*losses[:400], *(losses[400:800] + 5)])) <= 66  # half a window
    losses[150:160] = np.nan
    losses[200] += 1
    assert spikes(losses) == [201]


@pytest.mark.parametrize("cut", [5, 128, 150])
def test_a_resumed_run_finds_what_the_whole_one_does(cut):
    losses = falling()[9000:9300]
    losses[151::20] += 0.5
    whole = spikes(losses)
    assert whole
    detector = Detector(("loss",), 128, 6.0)
    for loss in losses[:cut]:
        detector.see({"loss": loss})
    kept = json.loads(json.dumps(detector.state()))
    detector = Detector(("loss",), 128, 6.0, kept)
    rest = [step for step, x in enumerate(losses[cut:], cut + 1) if detector.see({"loss": x})]
    assert rest == [step for step in whole if step > cut]


def test_rollbacks_are_kept(tmp_path):
    assert read_rollbacks(tmp_path) == []
    found = [Rollback(13, 10, 160, 208, "a"), Rollback(30, 20, 368, 528, "b")]
    write_rollbacks(tmp_path, found)
    assert read_rollbacks(tmp_path) == found
    assert [rollback.offset(16) for rollback in found] == [48, 208]
