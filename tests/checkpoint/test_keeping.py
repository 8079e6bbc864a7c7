"""Which checkpoints are kept: the newest, every so many, and those that measured best."""

import jax.numpy as jnp
import pytest
from etils import epath

from capjax.checkpoint import Keep, best_step
from capjax.checkpoint.directory import list_steps, set_aside
from capjax.errors import StorageError, UserError
from tests.checkpoint.faulty import Faulty, install, quick

METRIC = "eval/val/cider"
STATE = {"params": {"w": jnp.zeros(4)}, "step": jnp.int32(0)}
CIDER = {10: 0.1, 20: 0.9, 30: 0.4, 40: 0.9, 50: 0.2, 60: None, 70: 0.3, 80: 0.1}


def save(checkpointer, steps, values=CIDER, name=METRIC) -> None:
    for step in steps:
        metrics = {} if values[step] is None else {name: values[step]}
        checkpointer.save(step, STATE, {"examples_seen": 0, "metrics": metrics})
    checkpointer.wait()


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Keep(1), [80]),
        (Keep(2, keep_every_steps=30), [30, 60, 70, 80]),
        (Keep(1, best_metric=METRIC), [20, 80]),  # of equals the earliest
        (Keep(1, best_metric=METRIC, keep_best=3), [20, 30, 40, 80]),
        (Keep(2, best_metric=METRIC, best_mode="min"), [10, 70, 80]),
        (Keep(1, best_metric="eval/val/loss"), [80]),
    ],
    ids=str,
)
def test_what_is_kept(keep, kept, tmp_path, open_checkpointer):
    """The same whether one process saves all, or each save has its own, as after kills."""
    save(open_checkpointer(tmp_path / "one", keep=keep), CIDER)
    assert list_steps(epath.Path(tmp_path / "one")) == kept
    assert len(kept) <= keep.at_most(80)
    for step in CIDER:
        save(open_checkpointer(tmp_path / "each", keep=keep), [step])
    assert list_steps(epath.Path(tmp_path / "each")) == kept


def test_another_metric_may_be_chosen_later(tmp_path, open_checkpointer):
    directory = tmp_path / "checkpoints"
    ours = open_checkpointer(keep=Keep(8))
    for step, cider in ((10, 0.1), (20, 0.9), (30, 0.4)):
        metrics = {METRIC: cider, "eval/val/loss": cider}
        ours.save(step, STATE, {"examples_seen": 0, "metrics": metrics})
    ours.wait()
    keep = Keep(1, best_metric="eval/val/loss", best_mode="min")
    assert keep.ranked(epath.Path(directory))[0] == (10, 0.1)
    save(open_checkpointer(keep=keep), [50], {50: 0.5}, "eval/val/loss")
    assert list_steps(epath.Path(directory)) == [10, 50]


def test_a_best_one_that_cannot_be_seen_for_a_while_is_not_deleted(
    tmp_path, monkeypatch, open_checkpointer
):
    directory = epath.Path(tmp_path / "checkpoints")
    keep = Keep(1, best_metric=METRIC)
    save(open_checkpointer(keep=Keep(8)), [10, 20, 30])
    quick(monkeypatch)
    with monkeypatch.context() as patch:
        install(patch, Faulty(lambda n, name: "before" if name == "open" else ""))
        with pytest.raises(StorageError):
            keep.prune(directory)
    assert list_steps(directory) == [10, 20, 30]
    keep.prune(directory)
    assert list_steps(directory) == [20, 30]
    set_aside(directory, 20)  # a damaged one is no longer the best
    assert keep.ranked(directory) == [(30, 0.4)]


def test_an_unknown_metric_is_said_once_with_those_there_are(open_checkpointer):
    ours = open_checkpointer(keep=Keep(1, best_metric="eval/val/cidre"))
    save(ours, CIDER)
    (line,) = ours.reports
    assert line.startswith(
        "warning: checkpoint.best_metric=eval/val/cidre was not measured; did you mean "
        "eval/val/cider?; there are eval/val/cider;"
    )


def test_the_best_step_is_that_of_the_run_s_config(tmp_path, open_checkpointer):
    directory = tmp_path / "checkpoints"
    save(open_checkpointer(keep=Keep(9)), CIDER)
    with pytest.raises(UserError, match=r"--step=best: .*set no best_metric; name a step of \[10"):
        best_step(tmp_path)
    section = {"every_steps": 10, "keep": 9, "best_metric": METRIC, "best_mode": "min"}
    ours = open_checkpointer(keep=Keep(9))
    ours._run_metadata["config"] = {"checkpoint": section}
    save(ours, [90], {90: 0.5})
    assert best_step(tmp_path) == best_step(directory) == 10


@pytest.mark.parametrize(
    "wrong", [{"keep": 0}, {"keep_best": 0}, {"keep_every_steps": -1}, {"best_mode": "most"}]
)
def test_options_are_checked(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"checkpoint.{name}={value}: expected"):
        Keep(**wrong)
