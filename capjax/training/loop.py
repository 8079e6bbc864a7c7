"""The training loop of every stage. The order is law: evaluate, save, draw, step, log.

A stage is what is passed in: the step function, the batches, the evaluators, the save. Launching a
step does not wait for it, so the next batch is drawn, placed and launched while the device works,
and a step's metrics are read only when the next one is on its way. Before anything looks at the
state, that backlog is read: what a step did wrong is known before its state is looked at.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat, TypeVar

import jax

from capjax.dims import Batch, Metrics
from capjax.errors import UserError
from capjax.training.health import Health, Monitor, NonFiniteLoss
from capjax.training.metrics import MetricWriter
from capjax.training.phases import Phases
from capjax.training.profile import Tracer
from capjax.training.progress import (
    Progress,
    Throughput,
    peak_flops,
    peak_rss_bytes,
    process_age_s,
    progress_line,
)
from capjax.training.spikes import Spiked

State = TypeVar("State")


class Evaluator(NamedTuple):
    """`run(state, step)` -> metrics, every so many steps (0: never between) and at the end.

    `at_start`: before the first step too, of a run that starts from something.
    """

    name: str
    every_steps: int
    run: Callable[[Any, int], Mapping[str, SupportsFloat]]
    at_start: bool = False


class TrainSummary(NamedTuple):
    """What a run did. Rates leave evaluation, saves and compilation out; None: no such step."""

    start_step: int
    last_step: int
    final_loss: float | None  # None: of a step that was skipped too
    first_step_s: float | None  # from the start of the process to the first step's metrics
    compile_s: float | None  # tracing, compiling (or the cache), launching the first step
    train_s: float  # compilation and waiting for data included; evaluation and saves not
    data_wait_fraction: float  # of train_s, the first batch included
    images_per_s: float | None
    model_flops_per_s: float | None
    mfu: float | None
    peak_rss_bytes: int


class Stopped(UserError):  # noqa: N818  (what happened)
    """Training was asked to stop; its state of that moment is kept."""


def train(
    state: State,
    *,
    train_step: Callable[[State, Batch], tuple[State, Metrics]],
    batches: Iterator[Any],
    total_steps: int,
    batch_size: int,
    start_step: int = 0,
    place: Callable[[Any], Batch] = lambda rows: rows,
    evaluators: Sequence[Evaluator] = (),
    save: Callable[[int, State], None] | None = None,
    save_every_steps: int = 0,
    wait_for_saves: Callable[[], None] = lambda: None,
    writers: Sequence[MetricWriter] = (),
    log_every_steps: int = 1,
    progress: Progress | None = None,
    tracer: Tracer | None = None,
    flops_per_image: float = 0.0,
    host_metrics: Callable[[int], Mapping[str, SupportsFloat]] = lambda step: {},
    stop: Callable[[int], str] = lambda step: "",
    monitor: Monitor | None = None,
    phases: Phases | None = None,
) -> tuple[State, TrainSummary]:
    """Trains from `start_step` updates to `total_steps`; returns the state and a summary.

    Args:
      state: after `start_step` updates; given up (`train_step` may donate it).
      train_step: jitted, (state, batch) -> (state, metrics); metrics are scalars, among them
        `loss`, perhaps `nonfinite` (the state is as it was). The first call may compile.
      batches: host rows of the batches from `start_step` on; `place` puts them on the devices.
      batch_size: images in a global batch.
      evaluators: run after every `every_steps` updates and after the last.
      save: (step, state) -> None; must have copied what it needs when it returns. Called after
        every `save_every_steps` updates (0: only then) and after the last.
      wait_for_saves: returns once pending saves are kept.
      writers: get `train/...` every `log_every_steps` and at the end, and `eval/<name>/...`; they
        are flushed before each save, so that no checkpoint is ahead of its metrics.
      flops_per_image: FLOPs of the model, forward and backward.
      host_metrics: step -> more metrics, asked for whenever `train/...` is written, in every
        process alike.
      stop: step -> why to stop; "" goes on. Asked between steps, in every process alike. The state
        is saved before `Stopped` is raised.
      monitor: sees the metrics of every step and says which are too wrong to go on; without one
        that is the first that is not finite.
      phases: is told what the loop is at.

    Raises what the monitor found, with what was saved before it kept. The part between
    evaluations runs under `transfer_guard("disallow")`: implicit transfers are errors there, but
    for the first launch, which compiles.
    """
    progress, tracer = progress or Progress(is_shown=False), tracer or Tracer()
    clock = Throughput(batch_size)
    log = _Log(start_step, total_steps, log_every_steps, tuple(writers), progress, clock)
    log.flops_per_image, log.peak = flops_per_image, peak_flops(_devices(state))
    log.host_metrics = host_metrics
    log.monitor = monitor or Monitor(Health(max_skipped_in_a_row=0))
    log.phases = phases = phases or Phases()
    phases.step = start_step
    phases.enter("step")

    def is_due(every_steps: int, step: int) -> bool:
        at_mark = every_steps > 0 and step % every_steps == 0
        return step > start_step and (at_mark or step == total_steps)

    try:
        for step in range(start_step, total_steps + 1):  # `step` updates are in `state`
            is_first = step == start_step == 0
            due = [
                e for e in evaluators if is_due(e.every_steps, step) or (e.at_start and is_first)
            ]
            saving = save if is_due(save_every_steps, step) else None
            tracer.before(step, state)
            if due or saving or step == total_steps or stop(step):
                log.read_late()
            with clock.paused():
                for evaluator in due:
                    log.evaluated(step, evaluator, state)
                reason = stop(step) if step < total_steps else ""
                if reason:
                    log.read_late()
                saving = saving or (save if reason and step > start_step else None)
                if saving:
                    log.saved(step, saving, state)
            if reason:
                with phases.during("save"):
                    wait_for_saves()
                raise Stopped(reason)
            if step == total_steps:
                break
            with jax.transfer_guard("disallow"):
                with clock.waiting(), phases.during("data"):
                    rows = _draw(batches, step)
                batch = place(rows)
                with log.launching(step):
                    state, metrics = train_step(state, batch)
                log.read_late()  # of the step before, while this one runs
            log.late = (step + 1, metrics)
    except (NonFiniteLoss, Spiked):
        with phases.during("save"):
            wait_for_saves()
        raise
    finally:
        tracer.close()
    return state, log.summary()


def _draw(batches: Iterator[Any], step: int) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise RuntimeError(f"the batches ended before step {step + 1}, expected more") from None


def _devices(state: Any) -> set[jax.Device]:
    arrays = (leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))
    return set().union(*(array.sharding.device_set for array in arrays))


@dataclasses.dataclass
class _Log:
    """What the loop tells others, and the metrics it has not read yet."""

    start_step: int
    total_steps: int
    every_steps: int
    writers: tuple[MetricWriter, ...]
    progress: Progress
    clock: Throughput
    flops_per_image: float = 0.0
    peak: float | None = None
    host_metrics: Callable[[int], Mapping[str, SupportsFloat]] = lambda step: {}
    monitor: Monitor = dataclasses.field(default_factory=lambda: Monitor(Health()))
    phases: Phases = dataclasses.field(default_factory=Phases)
    late: tuple[int, Metrics] | None = None
    saved_step: int | None = None
    last_step: int = 0
    loss: float | None = None
    compile_s: float | None = None
    first_step_s: float | None = None

    def __post_init__(self):
        self.last_step = self.start_step
        self.saved_step = self.start_step or None  # resumed from a save

    @contextlib.contextmanager
    def launching(self, step: int) -> Iterator[None]:
        """Around the launch of the step after `step`: the first compiles, and says so.

        Compiling may transfer: on a GPU it reads constants that the step closes over. A transfer
        at every step is still caught, by the second.
        """
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            if step > self.start_step:
                yield
                return
            begin = time.monotonic()
            doing = self.progress.doing("compiling the training step")
            with self.phases.during("compile"), doing, jax.transfer_guard("allow"):
                yield
            self.compile_s = time.monotonic() - begin

    def read_late(self) -> None:
        """Reads the metrics kept back, if any. Raises what the monitor finds in them."""
        if self.late is None:
            return
        (step, metrics), self.late = self.late, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.clock.finished(step)
        self.phases.finished(step)
        self.last_step, self.loss = step, values["loss"]
        if self.first_step_s is None:
            self.first_step_s = process_age_s()
        seen = self.monitor.see(step, values, self.saved_step)
        for note in seen.notes:
            self.progress.say(note)
        is_last = step == self.total_steps or seen.error is not None
        if is_last or seen.is_wrong or step % self.every_steps == 0:
            more = {**seen.metrics, **self.rates(), **self.host_metrics(step)}
            self.write(step, "train/", {**values, **more})
        self.show(step, always=is_last or step == self.start_step + 1)
        if seen.error is not None:
            raise seen.error

    def rates(self) -> dict[str, float]:
        """Throughput of the last steps, by metric name."""
        rates = self.clock.recent()
        if rates is None:
            return {}
        values = {"images_per_s": rates.images_per_s, "data_wait": rates.data_wait}
        if self.flops_per_image and self.peak:
            values["mfu"] = self.flops_per_image * rates.images_per_s / self.peak
        return values

    def show(self, step: int, *, always: bool) -> None:
        """Updates the progress line."""
        line = progress_line(
            step,
            self.total_steps,
            math.nan if self.loss is None else self.loss,
            self.clock.recent(),
            flops_per_image=self.flops_per_image,
            peak=self.peak,
            rss_bytes=peak_rss_bytes(),
        )
        self.progress.show(line, always=always)

    def write(self, step: int, prefix: str, values: Mapping[str, SupportsFloat]) -> None:
        """Gives metrics to every writer."""
        for writer in self.writers:
            writer.write(step, {prefix + name: value for name, value in values.items()})

    def evaluated(self, step: int, evaluator: Evaluator, state: Any) -> None:
        """Runs an evaluator and writes what it finds."""
        doing = self.progress.doing(f"evaluating {evaluator.name} at step {step}")
        with self.phases.during("evaluation"), doing:
            values = evaluator.run(state, step)
        self.write(step, f"eval/{evaluator.name}/", values)

    def saved(self, step: int, save: Callable[[int, Any], None], state: Any) -> None:
        """Saves the state, after the metrics up to it are where a kill leaves them."""
        with self.phases.during("save"):
            for writer in self.writers:
                writer.flush()
            save(step, state)
        self.saved_step = step

    def summary(self) -> TrainSummary:
        """The whole run in numbers."""
        rates = self.clock.overall()
        flops = self.flops_per_image * rates.images_per_s if rates else 0.0
        return TrainSummary(
            start_step=self.start_step,
            last_step=self.last_step,
            final_loss=self.loss if self.loss is not None and math.isfinite(self.loss) else None,
            first_step_s=self.first_step_s,
            compile_s=self.compile_s,
            train_s=self.clock.training_s(),
            data_wait_fraction=self.clock.data_wait(),
            images_per_s=rates.images_per_s if rates else None,
            model_flops_per_s=flops or None,
            mfu=flops / self.peak if flops and self.peak else None,
            peak_rss_bytes=peak_rss_bytes(),
        )
