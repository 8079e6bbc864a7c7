"""Worker processes of a preparation: tasks that write files, run by as many as are wanted."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

from capjax.data.processes import die_with_parent


class Stopped(Exception):  # noqa: N818 (no error: the work was called off)
    """A task's way to give up once `is_stopped` says so."""


def run_all(
    function: Callable[..., None],
    shared: tuple[Any, ...],
    tasks: Sequence[tuple[Any, ...]],
    num_workers: int,
) -> Iterator[int]:
    """Runs `function(*shared, *task, is_stopped)` for every task; yields the index of each done.

    Up to `num_workers` processes share the work (1: this one does it). A worker ends with the
    process that started it, even by kill -9. The first error of a task is raised.
    """
    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        for number, task in enumerate(tasks):
            function(*shared, *task, lambda: False)
            yield number
        return
    # Not forked: a fork copies the threads' locks, held or not, and the lock on the output.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (function, shared, stop))
    waiting: dict[Future, int] = {}
    queue = iter(range(len(tasks)))
    try:
        while True:
            # Few at a time: a queue of a million tasks takes memory and is slow to call off.
            while len(waiting) < 2 * num_workers and (number := next(queue, None)) is not None:
                waiting[pool.submit(_run_task, tasks[number])] = number
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                future.result()
                yield waiting.pop(future)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(function: Callable[..., None], shared: tuple[Any, ...], stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and calls the work off
    _worker.update(function=function, shared=shared, stop=stop)
    die_with_parent()


def _run_task(task: tuple[Any, ...]) -> None:
    with contextlib.suppress(Stopped):
        _worker["function"](*_worker["shared"], *task, _worker["stop"].is_set)
