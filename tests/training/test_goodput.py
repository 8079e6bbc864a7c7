"""Every second of a run has its place: useful, lost by a kill, or idle between two launches."""

import itertools
import json
import shutil

import pytest

from capjax.training import goodput
from capjax.training.goodput import LaunchLog, read_accounts, time_spent, unaccounted_s
from capjax.training.phases import PHASES, Phases


class Clock:
    """Time that passes when told to, for both clocks."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "time", self)

    def __call__(self):
        return self.now

    def pass_(self, phases, **seconds):
        for phase, value in seconds.items():
            with phases.during(phase):
                self.now += value


def launch(root, clock, start_step, steps, save_at=(), init=4.0):
    """A launch of steps of 2 s, one of them waiting, that ends without a word."""
    phases = Phases(init, clock)
    log = LaunchLog(root, phases, start_step)
    phases.enter("step")
    for step in range(start_step + 1, start_step + steps + 1):
        clock.pass_(phases, **({"compile": 10.0} if step == start_step + 1 else {}), data=0.5)
        clock.now += 1.5
        phases.finished(step)
        if step in save_at:
            clock.pass_(phases, evaluation=3.0, save=1.0)
            log.keep()
    return log


def test_what_was_done_again_is_lost_and_what_is_between_is_idle(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    first = launch(tmp_path, clock, 0, 16, save_at=(5, 10))
    # Killed 6 steps after a save; the account knows of all that finished half a percent ago.
    known = read_accounts(tmp_path / "launches.jsonl")[-1]
    assert known.step >= 14
    clock.now = known.end + 100.0 + 4.0
    second = launch(tmp_path, clock, 10, 5, save_at=(15,))
    spent = second.spent()
    assert spent.launches == 2 and spent.idle_s == pytest.approx(100)
    assert spent.seconds == pytest.approx(
        {
            "init": 8.0,
            "compile": 20.0,
            "data": 0.5 * 15,
            "step": 1.5 * 15,
            "evaluation": 9.0,
            "save": 3.0,
            "lost": 2.0 * (known.step - 10),
        }
    )
    assert spent.goodput == pytest.approx(22.5 / sum(spent.seconds.values()))
    assert spent.total_s + spent.idle_s == pytest.approx(clock.now - 1000.0 + 4.0)
    # The same from the file alone, as a page reads it.
    again = time_spent(read_accounts(tmp_path / "launches.jsonl"))
    assert again.seconds == pytest.approx(spent.seconds, abs=0.01)
    assert again.idle_s == pytest.approx(100, abs=0.01) and again.launches == 2
    assert first.spent().launches == 1


def test_a_launch_that_kept_nothing_is_lost_but_for_its_start(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    launch(tmp_path, clock, 0, 10, save_at=(10,))
    launch(tmp_path, clock, 10, 20)  # and starts from 0 next: the checkpoint was damaged
    log = launch(tmp_path, clock, 0, 1)
    spent = log.spent()
    assert spent.seconds["step"] == 1.5 and spent.seconds["compile"] == 30.0
    known = {a.launch: a.step - a.start_step for a in read_accounts(tmp_path / "launches.jsonl")}
    assert spent.seconds["lost"] == pytest.approx(4.0 + 2.0 * (known[1] + known[2]))


def test_no_kill_takes_a_hundredth_of_the_account(tmp_path, monkeypatch):
    """Wherever the file ends, the last whole line is at most 0.5 % of the age old."""
    clock = Clock(monkeypatch)
    launch(tmp_path, clock, 0, 4000, save_at=(2000,))
    path = tmp_path / "launches.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) < 900  # few, for 8000 s
    accounts = read_accounts(path)
    for before, after in itertools.pairwise(accounts):
        age = after.end - after.began
        assert after.end - before.end <= max(1.0, 0.005 * age) + 12.0  # and a step, which compiles
    for torn in (lines[-1][:-1], lines[-1][:30], lines[-1][:-1] + b"\xff"):
        path.write_bytes(b"".join(lines[:-1]) + torn)
        clock.now = accounts[-1].end + 50.0
        LaunchLog(tmp_path, Phases(0.0, clock), 2000).keep()
        assert [a.launch for a in read_accounts(path)][-3:] == [1, 2, 2]
    assert set(json.loads(lines[0])["seconds"]) == set(PHASES)


def test_a_process_is_not_counted_twice(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(goodput, "process_age_s", lambda: 60.0)
    assert unaccounted_s(tmp_path) == 60.0
    launch(tmp_path, clock, 0, 3, save_at=(3,))
    clock.now += 7.0
    assert unaccounted_s(tmp_path) == pytest.approx(7.0)
    clock.now += 70.0
    assert unaccounted_s(tmp_path) == 60.0


def test_a_disk_that_is_gone_ends_nothing(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    (tmp_path / "run").mkdir()
    log = launch(tmp_path / "run", clock, 0, 1)
    shutil.rmtree(tmp_path / "run")
    log.keep()
    assert log.spent().launches == 1
