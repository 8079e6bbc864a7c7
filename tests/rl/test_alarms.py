"""When alarms are raised, and that each is raised once."""

import pytest

from capjax.errors import UserError
from capjax.rl.alarms import Alarms, Watch

JUDGE = "eval/val/rd100_r1"


def run(watch, rewards, judged):
    """An evaluation after each reward; the steps that raised an alarm."""
    raised = []
    for step, (reward, judge) in enumerate(zip(rewards, judged, strict=True), 1):
        raised += [(step, text) for text in watch.see(step, {"train/reward": reward})]
        raised += [(step, text) for text in watch.see(step, {JUDGE: judge})]
    return raised


def test_a_reward_that_rises_alone_is_seen_once():
    rewards = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    raised = run(Watch(Alarms(window=2)), rewards, [0.5, 0.6, 0.7, 0.6, 0.6, 0.5])
    assert [step for step, _ in raised] == [4]
    assert "went from 0.6 to 0.6" in raised[0][1]


@pytest.mark.parametrize(
    ("rewards", "judged"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5]),  # both rise
        ([0.5, 0.4, 0.3, 0.2, 0.1], [0.5, 0.4, 0.3, 0.2, 0.1]),  # both fall
    ],
)
def test_no_alarm_where_they_go_together(rewards, judged):
    assert not run(Watch(Alarms(window=2)), rewards, judged)


def test_there_is_no_reward_before_the_first_step():
    watch = Watch(Alarms(window=2))
    assert not watch.see(0, {JUDGE: 0.5})
    assert not run(watch, [1.1, 1.0, 0.9], [0.5, 0.5, 0.5])


def test_only_evaluations_of_as_many_images_are_compared():
    watch, raised = Watch(Alarms(window=1)), []
    for step, (judge, num_images) in enumerate([(0.7, 128), (0.8, 128), (0.6, 366), (0.6, 366)]):
        values = {JUDGE: judge, "eval/val/num_images": num_images}
        distinct = {"eval/val/distinct_ratio": 128 / num_images}  # as many different ones
        raised.append(watch.see(step, {"train/reward": float(step), **values, **distinct}))
    assert not any(raised[:3])
    assert len(raised[3]) == 1


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("train/kl", [1.0, 6.0, 7.0, 1.0, 6.0]),
        ("train/repetition", [0.1, 0.4, 0.4, 0.1, 0.5]),
        ("train/caption_tokens", [8.0, 17.0, 18.0, 9.0, 20.0]),
        ("eval/val/distinct_ratio", [0.8, 0.3, 0.2, 0.5, 0.1]),
    ],
)
def test_each_is_raised_when_it_begins(name, values):
    watch = Watch(Alarms(max_kl=5.0))
    raised = [step for step, x in enumerate(values) if watch.see(step, {name: x})]
    assert raised == [1, 4]


def test_what_makes_no_sense_is_refused():
    for fields in ({"action": "halt"}, {"window": 0}, {"rate_factor": 1.0}):
        with pytest.raises(UserError, match="alarms"):
            Alarms(**fields)
