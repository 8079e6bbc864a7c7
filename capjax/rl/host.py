"""Steps with rewards of the host: one batch is scored there while the devices update on another.

The captions of the next batch are sampled before the update on this one, so they are one update
behind (their ratio to the policy is in the loss), and while the update runs the host scores them.
They lie in the state, so a resumed run learns from the very captions that the run would have.

Letters beyond `capjax.dims`: J captions of an image, b the rows of this process.
"""

import contextlib
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import jax
import numpy as np

from capjax.dims import Array, Batch, Metrics
from capjax.rl.state import ReinforceState

Rows = dict[str, np.ndarray]
# (rows of this process, token ids [b, J, L]) -> arrays [b, ...] by name, for `given`.
Score = Callable[[Rows, np.ndarray], Rows]
GRACE_S = 5.0  # what a score under way has to end in when a run ends


class Drawn(NamedTuple):
    """A batch: this process's rows, and the global batch on the devices."""

    rows: Rows
    batch: Batch


def with_next(batches: Generator[Rows]) -> Generator[tuple[Rows, Rows]]:
    """Each batch with the one after it."""
    with contextlib.closing(batches):
        current = next(batches)
        for following in batches:
            yield current, following
            current = following


class Programs(NamedTuple):
    """The compiled parts of `capjax.rl.step.Step`, and what they take that does not train."""

    sampled: Callable
    learned: Callable
    frozen: Any


class HostStep:
    """`step(state, pair)` -> (state, metrics), for the loop; `place` makes its pairs.

    Args:
      score: called in a thread of its own, for one batch at a time.
      place_rows: puts this process's rows onto the devices as rows of the global batch.
    """

    def __init__(self, score: Score, place_rows: Callable[[Rows], Batch]) -> None:
        self._score, self._place_rows = score, place_rows
        self.programs: Programs | None = None  # set before the first call
        self._scores: Future[Rows] | None = None
        self._next: Drawn | None = None

    def place(self, pair: tuple[Rows, Rows]) -> tuple[Drawn, Drawn]:
        """The pair on the devices; what was the second of the pair before is not placed again."""
        current = self._next or self._drawn(pair[0])
        self._next = self._drawn(pair[1])
        return current, self._next

    def _drawn(self, rows: Rows) -> Drawn:
        return Drawn(rows, self._place_rows(rows))

    def __call__(
        self, state: ReinforceState, pair: tuple[Drawn, Drawn]
    ) -> tuple[ReinforceState, Metrics]:
        """Samples for the second batch, then updates on the first."""
        assert self.programs is not None
        sampled, learned, frozen = self.programs
        current, following = pair
        policy, captions = state._replace(ahead=None), state.ahead
        if captions is None or (self._scores is None and not int(jax.device_get(state.step))):
            captions = sampled(policy, current.batch)  # the first of the run
        if self._scores is None:
            self._scores = in_background(self._scored, current.rows, captions.tokens_BKL)
        ahead = sampled(policy, following.batch)
        given = self._place_rows(self._scores.result())
        self._scores = in_background(self._scored, following.rows, ahead.tokens_BKL)
        after, metrics = learned(policy, frozen, current.batch, captions, given)
        return after._replace(ahead=ahead), metrics

    def _scored(self, rows: Rows, tokens_BJL: Array) -> Rows:
        return self._score(rows, local_rows(tokens_BJL))

    def close(self) -> None:
        """Waits a little for what is under way; a function that hangs is left alone."""
        if self._scores is not None:
            wait([self._scores], GRACE_S)


def in_background(work: Callable[..., Rows], *args: Any) -> Future[Rows]:
    """What `work(*args)` gives, in a thread that the end of the process does not wait for.

    An executor's threads are waited for: a function of the user's may never return.
    """
    future: Future[Rows] = Future()

    def run() -> None:
        try:
            future.set_result(work(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="rewards", daemon=True).start()
    return future


def local_rows(x: Array) -> np.ndarray:
    """This process's rows of an array whose leading axis alone is split, in their order."""
    if x.is_fully_addressable:
        return np.asarray(x)
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
