"""The order of the loop, its lateness, its stops and its resumes, on a step of three numbers."""

import io
import itertools
import json
import math
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.training.health import Health, Monitor, NonFiniteLoss
from capjax.training.loop import Evaluator, Stopped, train
from capjax.training.metrics import JsonlWriter, read_metrics
from capjax.training.profile import Tracer
from capjax.training.progress import Progress

SHIFT = 7.0  # x at or below minus this makes the loss, and then the weight, nan


class State(NamedTuple):
    step: jax.Array
    weight: jax.Array


@partial(jax.jit, donate_argnums=0)
def fitted(state, batch):
    """One step on a weight of three numbers."""
    loss = jnp.mean((batch["x"] - state.weight[None, :]) ** 2) + jnp.log(batch["x"][0, 0] + SHIFT)
    weight = 0.9 * state.weight + 0.1 * batch["x"][0] + 0.0 * loss
    return State(state.step + 1, weight), {"loss": loss, "norm": jnp.sum(weight)}


def start():
    return State(jax.device_put(np.int32(0)), jax.device_put(np.zeros(3, np.float32)))


def rows(start_step=0, nan_at=None):
    for step in itertools.count(start_step):
        x = np.full((2, 3), -2 * SHIFT if step + 1 == nan_at else 1 / (1 + step), np.float32)
        yield {"x": x}


def run(state=None, *, start_step=0, total_steps=6, nan_at=None, **options):
    return train(
        start() if state is None else state,
        **{
            "train_step": fitted,
            "batches": rows(start_step, nan_at),
            "place": jax.device_put,
            "start_step": start_step,
            "total_steps": total_steps,
            "batch_size": 2,
        }
        | options,
    )


class Recorder:
    """A writer that remembers, in a list which others may share."""

    def __init__(self, events=None):
        self.events = [] if events is None else events

    def write(self, step, values):
        self.events.append(("log", step, dict(values)))

    def flush(self):
        self.events.append(("flush",))

    def close(self):
        pass

    def losses(self):
        return {e[1]: e[2]["train/loss"] for e in self.events if "train/loss" in e[-1]}


def test_order_is_evaluate_save_draw_step_log():
    events = []

    def drawn():
        for step, batch in enumerate(rows()):
            events.append(("draw", step + 1))
            yield batch

    def launched(state, batch):
        new_state, metrics = fitted(state, batch)
        events.append(("step", len([e for e in events if e[0] == "step"]) + 1))
        return new_state, metrics

    def evaluate(state, step):
        events.append(("evaluate", step, int(state.step)))
        return {"score": 1.5}

    def save(step, state):
        events.append(("save", step, int(state.step)))

    run(
        train_step=launched,
        batches=drawn(),
        evaluators=[Evaluator("val", 2, evaluate)],
        save=save,
        save_every_steps=4,
        writers=[Recorder(events)],
        total_steps=5,
    )
    short = [
        (*e[:2], "eval" if "eval/val/score" in e[2] else "train") if e[0] == "log" else e
        for e in events
    ]
    assert short == [
        ("draw", 1),
        ("step", 1),
        ("draw", 2),
        ("step", 2),  # launched before the metrics of the step before it are read
        ("log", 1, "train"),
        ("log", 2, "train"),
        ("evaluate", 2, 2),
        ("log", 2, "eval"),
        ("draw", 3),
        ("step", 3),
        ("draw", 4),
        ("step", 4),
        ("log", 3, "train"),
        ("log", 4, "train"),
        ("evaluate", 4, 4),
        ("log", 4, "eval"),
        ("flush",),
        ("save", 4, 4),
        ("draw", 5),
        ("step", 5),
        ("log", 5, "train"),
        ("evaluate", 5, 5),  # and once more at the end
        ("log", 5, "eval"),
        ("flush",),
        ("save", 5, 5),
    ]


def test_resume_continues_the_numbering_and_the_losses_bit_for_bit(tmp_path):
    whole, saved = Recorder(), {}
    final, _ = run(
        writers=[whole],
        save=lambda step, state: saved.update({step: jax.tree.map(np.array, state)}),
        save_every_steps=4,
    )
    path = tmp_path / "metrics.jsonl"
    for start_step, total in ((0, 5), (4, 6)):  # killed after 5 steps, the last save being of 4
        writer = JsonlWriter(path, restored_step=start_step or None)
        state = jax.device_put(saved[4]) if start_step else None
        resumed, summary = run(state, start_step=start_step, total_steps=total, writers=[writer])
        writer.close()
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["train/loss"] for line in lines] == list(whole.losses().values())
    assert jax.tree.map(np.array_equal, resumed, final) == State(True, True)
    assert (summary.start_step, summary.last_step) == (4, 6)


def test_resuming_a_finished_run_does_nothing():
    def never(*_):
        raise AssertionError("called")

    state, summary = run(
        start_step=6, evaluators=[Evaluator("val", 2, never)], save=never, save_every_steps=2
    )
    assert int(state.step) == 0
    assert summary.final_loss is None and summary.first_step_s is None
    assert summary.images_per_s is None and summary.last_step == 6


def test_logged_steps_are_a_part_of_every_step_logged_and_the_last():
    every, some = Recorder(), Recorder()
    run(writers=[every])
    run(writers=[some], log_every_steps=4)
    assert list(every.losses()) == [1, 2, 3, 4, 5, 6]
    assert some.losses() == {step: every.losses()[step] for step in (4, 6)}
    # The third loss, worked by hand: x is 1, 1/2, 1/3 and the weight before it .9 * .1 + .05.
    assert every.losses()[3] == pytest.approx((1 / 3 - 0.14) ** 2 + math.log(1 / 3 + SHIFT))
    last = every.events[-1][2]
    assert last["train/images_per_s"] > 0 and 0 <= last["train/data_wait"] <= 1


@pytest.mark.parametrize(("nan_at", "saved"), [(4, [2]), (5, [2, 4]), (1, []), (6, [2, 4])])
def test_nonfinite_loss_stops_and_is_never_saved(nan_at, saved):
    saves, waits, writer = [], [], Recorder()
    with pytest.raises(NonFiniteLoss) as error:
        run(
            nan_at=nan_at,
            save=lambda step, state: saves.append((step, bool(jnp.isfinite(state.weight).all()))),
            save_every_steps=2,
            wait_for_saves=lambda: waits.append(list(saves)),
            writers=[writer],
            log_every_steps=100,
            evaluators=[Evaluator("val", nan_at, lambda state, step: pytest.fail("evaluated"))],
        )
    assert saves == [(step, True) for step in saved]
    assert waits == [saves]
    assert error.value.step == nan_at
    assert error.value.saved_step == (saved[-1] if saved else None)
    kept = f"step {saved[-1]} is kept" if saved else "nothing was saved"
    assert f"not finite at step {nan_at} (loss=nan); {kept}" in str(error.value)
    assert isinstance(error.value, UserError)
    assert math.isnan(writer.losses()[nan_at])  # the line is there to look at


def test_nonfinite_gradients_stop_though_the_loss_is_finite():
    @jax.jit
    def overflowing(state, batch):
        bad = state.step == 2
        metrics = {"loss": jnp.float32(1), "grad_norm": jnp.float32(3), "nonfinite": bad}
        return State(state.step + 1, state.weight), metrics

    with pytest.raises(NonFiniteLoss, match=r"step 3 \(loss=1, grad_norm=3, nonfinite=1\); step 1"):
        run(
            State(jax.device_put(np.int32(1)), start().weight), train_step=overflowing, start_step=1
        )


@jax.jit
def guarded(state, batch):
    """`fitted`, whose state stays where its loss is not finite, as `make_train_step` has it."""
    after, metrics = fitted(state, batch)
    is_finite = jnp.isfinite(metrics["loss"])
    return State(after.step, jnp.where(is_finite, after.weight, state.weight)), metrics


def test_steps_that_are_skipped_are_counted_logged_and_gone_on_from():
    writer, saved = Recorder(), []
    monitor = Monitor(Health(max_skipped_in_a_row=1))
    state, summary = run(
        train_step=guarded,
        nan_at=4,
        monitor=monitor,
        writers=[writer],
        log_every_steps=3,
        save=lambda step, state: saved.append((step, monitor.state()["skipped"])),
        save_every_steps=2,
    )
    lines = {step: line for _, step, line in (e for e in writer.events if e[0] == "log")}
    assert list(lines) == [3, 4, 6] and math.isnan(lines[4]["train/loss"])
    assert [line["train/skipped"] for line in lines.values()] == [0, 1, 1]
    assert saved == [(2, 0), (4, 1), (6, 1)]  # the count is that of the step that is saved
    others = (batch for step, batch in enumerate(rows()) if step != 3)
    expected, _ = run(train_step=guarded, batches=others, total_steps=5)
    np.testing.assert_array_equal(state.weight, expected.weight)
    assert (int(state.step), summary.last_step) == (6, 6)
    with pytest.raises(NonFiniteLoss, match=r"at step 3 .*2 steps in a row"):
        never = (batch | {"x": batch["x"] - 3 * SHIFT} for batch in rows(1))
        batches = itertools.chain(itertools.islice(rows(), 1), never)
        run(train_step=guarded, batches=batches, monitor=Monitor(Health(max_skipped_in_a_row=1)))


def test_every_step_is_checked_one_step_late():
    """Between logs too: the step after the bad one was launched, no other."""
    drawn = []

    def counted():
        for batch in rows(nan_at=3):
            drawn.append(len(drawn) + 1)
            yield batch

    with pytest.raises(NonFiniteLoss):
        run(batches=counted(), total_steps=100, log_every_steps=50)
    assert drawn == [1, 2, 3, 4]


def test_metrics_are_read_while_the_next_step_runs():
    launches = []

    class Late:
        """A metric that can be read only once the next step was launched."""

        def __init__(self, step):
            self.step = step

        def __array__(self, dtype=None, copy=None):
            assert len(launches) > self.step or self.step == 6, "read too early"
            return np.asarray(1.0, dtype)

    def launch(state, batch):
        launches.append(len(launches) + 1)
        return state, {"loss": Late(launches[-1])}

    _, summary = run(train_step=launch)
    assert summary.final_loss == 1.0


@pytest.mark.parametrize("where", ["step", "place", "metrics"])
def test_implicit_transfers_in_the_hot_loop_fail(where):
    leak = np.ones((2, 3), np.float32)

    def leaky_step(state, batch):
        return fitted(state, {"x": leak})

    def leaky_place(batch):
        return {"x": jnp.zeros((2, 3)) + batch["x"]}

    def leaky_metrics(state, batch):
        state, metrics = fitted(state, batch)
        return state, metrics | {"twice": metrics["loss"] * 2}

    options = {
        "step": {"train_step": leaky_step},
        "place": {"place": leaky_place},
        "metrics": {"train_step": leaky_metrics},
    }[where]
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(**options)


def test_the_launch_that_compiles_may_transfer():
    """Constants that a step closes over are read from the device then, where that is no CPU."""

    def launch(state, batch):
        return fitted(state, {"x": np.ones((2, 3), np.float32)})

    run(train_step=launch, total_steps=1)


@pytest.mark.parametrize(("start_step", "expected"), [(0, [0, 4, 6]), (2, [4, 6])])
def test_an_evaluation_before_the_first_step(start_step, expected):
    """Of a whole run; one that goes on was evaluated before."""
    seen = []
    evaluate = Evaluator("val", 4, lambda state, step: seen.append(step) or {}, at_start=True)
    run(evaluators=[evaluate], start_step=start_step, total_steps=6)
    assert seen == expected


def test_a_stop_saves_the_state_of_its_step():
    saved, metrics = [], Recorder()
    asked = iter(["", "", "", "enough", "enough"])  # at the top of steps 0, 1, 2, and then
    with pytest.raises(Stopped, match="enough"):
        run(
            stop=lambda step: next(asked, "enough"),
            save=lambda step, state: saved.append((step, int(state.step))),
            writers=[metrics],
        )
    assert len(saved) == 1 and saved[0][0] == saved[0][1] == max(metrics.losses())


def test_evaluators_and_saves_may_transfer():
    seen = []
    run(
        evaluators=[Evaluator("val", 3, lambda state, step: {"w": (state.weight + 1.0).sum()})],
        save=lambda step, state: seen.append(float((state.weight * 2.0)[0])),
        writers=[Recorder()],
    )
    assert len(seen) == 1


def test_nothing_compiles_twice():
    fitted.clear_cache()
    run(
        evaluators=[Evaluator("val", 2, lambda state, step: {"w": state.weight[0]})],
        save=lambda step, state: None,
        save_every_steps=3,
    )
    assert fitted._cache_size() == 1


def test_batches_that_end_are_an_error():
    with pytest.raises(RuntimeError, match="ended before step 3"):
        run(batches=itertools.islice(rows(), 2))


def test_summary_and_progress():
    stream = io.StringIO()
    with Progress(stream) as progress:
        _, summary = run(progress=progress, flops_per_image=5e6)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "compiling the training step..."
    assert lines[1].startswith("compiling the training step... ") and lines[1].endswith(" s")
    assert lines[2].startswith("step 1/6  loss ") and "images/s" not in lines[2]
    assert lines[-1].startswith("step 6/6  loss ") and "GFLOP/s" in lines[-1]
    assert summary.compile_s is not None and summary.first_step_s is not None
    assert 0 < summary.compile_s < summary.train_s
    assert summary.first_step_s > summary.compile_s
    assert 0 <= summary.data_wait_fraction < 1
    assert summary.images_per_s is not None and summary.mfu is None  # no peak is known for a CPU
    assert summary.model_flops_per_s == 5e6 * summary.images_per_s
    assert summary.peak_rss_bytes > 10_000_000
    json.dumps(summary._asdict())


def test_evaluations_do_not_count_as_training():
    def slow(state, step):
        time.sleep(0.4)
        return {}

    _, summary = run(evaluators=[Evaluator("val", 2, slow)])  # three times
    assert summary.train_s < 1.0


def test_trace_of_chosen_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(("start", path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop",)))

    def launch(state, batch):
        calls.append(("step", int(state.step) + 1))
        return fitted(state, batch)

    tracer = Tracer(tmp_path / "profile", start_step=2, num_steps=2)
    run(train_step=launch, tracer=tracer, total_steps=5)
    start_call, stop = ("start", str(tmp_path / "profile")), ("stop",)
    steps = [("step", n) for n in range(1, 6)]
    assert calls == [*steps[:2], start_call, *steps[2:4], stop, steps[4]]
    calls.clear()
    run(train_step=launch, tracer=Tracer(tmp_path, 4, 9), total_steps=5)  # the run ends inside
    assert calls == [*steps[:4], ("start", str(tmp_path)), steps[4], stop]
    calls.clear()
    with pytest.raises(NonFiniteLoss):  # and so does one that fails
        run(train_step=launch, tracer=Tracer(tmp_path, 1, 9), nan_at=2)
    assert calls[-1] == stop and calls.count(stop) == 1


def test_trace_is_written(tmp_path):
    run(tracer=Tracer(tmp_path / "profile", start_step=1, num_steps=1))
    assert list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))
