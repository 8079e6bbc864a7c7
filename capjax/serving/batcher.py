"""One thread owns the device: requests that wait together go to it together."""

import collections
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from capjax.decoding.inputs import compiled_size
from capjax.decoding.loaded_model import LoadedModel
from capjax.decoding.options import DecodingOptions
from capjax.errors import UserError
from capjax.serving.captions import Record, Structure, batch_key, caption_batch, structure
from capjax.serving.limits import Limits
from capjax.serving.metrics import Metrics
from capjax.serving.parameters import Parameters


class _Job(NamedTuple):
    image: np.ndarray  # uint8 [size, size, 3]
    parameters: Parameters
    record: Future[Record]
    arrived: float


class Batcher:
    """Captions single images in batches, on a thread of its own from `start` to `close`.

    The oldest image goes next, and with it those with the same options (`batch_key`), as soon as
    they fill a batch or it has waited `limits.wait_s`. Batches are padded to powers of two, and all
    those of a warmed structure are compiled before `is_ready`. Structures beyond these compile when
    they are first asked for, up to `limits.max_structures`.

    Args:
      warm: options to compile first, for every size of batch.
      on_ready, on_failure: called on that thread when they are compiled, or cannot be.
    """

    def __init__(
        self,
        captioner: LoadedModel,
        limits: Limits,
        metrics: Metrics,
        warm: Sequence[DecodingOptions] = (),
        on_ready: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._captioner = captioner
        self._limits = limits
        self._metrics = metrics
        self._warm = warm
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._groups: dict[Hashable, collections.deque[_Job]] = {}
        self._structures: dict[Structure, None] = {}  # in the order of their first request
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="captions", daemon=True)
        self.is_ready = False
        self.failure: BaseException | None = None  # of the warm-up: nothing can be served

    def start(self) -> None:
        """Begins to compile, then to serve."""
        self._thread.start()

    def close(self) -> None:
        """Captions what waits, then stops the thread; leaves a warm-up at its next program."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def admit(self, options: DecodingOptions) -> None:
        """Counts the structure of these options. Raises `UserError` where it is one too many."""
        asked = structure(options)
        with self._changed:
            if asked not in self._structures and self._is_full():
                known = "; ".join(map(str, self._structures))
                raise UserError(
                    f"{asked}: this server has {self._limits.max_structures} kinds of search and "
                    f"compiles no more; ask for one of these: {known}"
                )
            self._structures[asked] = None
            self._metrics.structures.set(len(self._structures))

    def submit(self, image: np.ndarray, parameters: Parameters) -> Future[Record]:
        """The record to be; a caller that gives up cancels it. Its options must be admitted."""
        job = _Job(image, parameters, Future(), time.monotonic())
        with self._changed:
            if self._is_closing:
                raise RuntimeError("the server is stopping")
            self._groups.setdefault(batch_key(parameters), collections.deque()).append(job)
            self._changed.notify()
        return job.record

    def num_waiting(self) -> int:
        """Images that no batch has taken yet."""
        with self._changed:
            return sum(map(len, self._groups.values()))

    def _is_full(self) -> bool:
        return len(self._structures) >= self._limits.max_structures

    def _work(self) -> None:
        try:
            self._warm_up()
        except BaseException as error:
            self.failure = error
            self._on_failure()
            return
        if not self._is_closing:
            self.is_ready = True
            self._on_ready()
        while jobs := self._next_batch():
            self._caption(jobs)

    def _warm_up(self) -> None:
        size = self._captioner.preprocessing.image_size
        image = np.zeros((size, size, 3), np.uint8)
        for options in self._warm:
            self.admit(options)
            rows = 1
            while rows <= self._limits.batch_size and not self._is_closing:
                one = Parameters(options, seed=0, prefix="", key="")
                caption_batch(self._captioner, [image] * rows, [one] * rows, rows)
                rows *= 2

    def _next_batch(self) -> list[_Job]:
        """Waits for the next batch; empty where the batcher is closed and nothing waits."""
        most = self._limits.batch_size
        with self._changed:
            while True:
                if not self._groups:
                    if self._is_closing:
                        return []
                    self._changed.wait()
                    continue
                key = min(self._groups, key=lambda key: self._groups[key][0].arrived)
                jobs = self._groups[key]
                wait = jobs[0].arrived + self._limits.wait_s - time.monotonic()
                if len(jobs) >= most or wait <= 0 or self._is_closing:
                    taken = [jobs.popleft() for _ in range(min(most, len(jobs)))]
                    if not jobs:
                        del self._groups[key]
                    return taken
                self._changed.wait(wait)

    def _caption(self, jobs: list[_Job]) -> None:
        jobs = [job for job in jobs if job.record.set_running_or_notify_cancel()]
        if not jobs:  # their callers have given up
            return
        begin = time.monotonic()
        try:
            records = caption_batch(
                self._captioner,
                [job.image for job in jobs],
                [job.parameters for job in jobs],
                self._limits.batch_size,
            )
        except Exception as error:
            for job in jobs:
                job.record.set_exception(error)
            return
        rows = compiled_size(len(jobs), self._limits.batch_size)
        captions = sum(len(record.get("captions", [record])) for record in records)
        self._metrics.batch_done(len(jobs), rows, captions, time.monotonic() - begin)
        for job, record in zip(jobs, records, strict=True):
            job.record.set_result(record)
