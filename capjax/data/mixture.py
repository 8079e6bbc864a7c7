"""Which source stands at a position of the stream: a pure function of (seed, schedule, position).

Positions come in blocks of `BLOCK`. In each, every source has the number of places that its weight
gives it, to the place, and they are shuffled: so no row of a batch sees one source alone, however
weights and batch size divide (a mixture in a fixed cycle would do that), and no count drifts. A
source's own position is the number of its places before: derived, never stored.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import SupportsIndex

import numpy as np

from capjax.data.records import Example, checked_index
from capjax.data.sources import Source
from capjax.data.stream import mix
from capjax.errors import UserError

BLOCK = 1024

Schedule = tuple[tuple[int, tuple[float, ...]], ...]


@dataclasses.dataclass(frozen=True)
class MixtureOrder:
    """The order of a mixture.

    Attributes:
      seed: of the run.
      schedule: (position from which on, weights of the sources from there on), the first from 0.
        Entries may be appended beyond the position that a run has reached: what stands before
        them does not change.

    Raises `UserError` for weights or positions that make no schedule.
    """

    seed: int
    schedule: Schedule

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.schedule]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise UserError(
                f"data.schedule={self.schedule}: expected (position, weights) pairs, the first "
                "position 0 and each later one above that before it"
            )
        for _, weights in self.schedule:
            if len(weights) != self.num_sources:
                raise UserError(
                    f"data.schedule={self.schedule}: expected as many weights in every entry, one "
                    "for each source of data.mixture"
                )
            if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:
                raise UserError(
                    f"data.schedule: weights {weights}: expected numbers >= 0, one of them above 0"
                )

    @property
    def num_sources(self) -> int:
        """How many sources are mixed."""
        return len(self.schedule[0][1])

    def place(self, position: int) -> tuple[int, int]:
        """(number of the source, position within the source's own stream) at a position."""
        starts, bases = self._segments
        segment = bisect.bisect_right(starts, position) - 1
        source, ahead = self._ahead(segment, position - starts[segment])
        return source, bases[segment][source] + ahead[source]

    def counts(self, position: int) -> tuple[int, ...]:
        """How many of the positions before this one each source has."""
        starts, bases = self._segments
        segment = bisect.bisect_right(starts, position) - 1
        _, ahead = self._ahead(segment, position - starts[segment])
        return tuple(base + more for base, more in zip(bases[segment], ahead, strict=True))

    @functools.cached_property
    def _segments(self) -> tuple[list[int], list[tuple[int, ...]]]:
        """Where each entry of the schedule begins, and what each source has had before."""
        starts, bases = [0], [(0,) * self.num_sources]
        for segment, ((start, _), (end, _)) in enumerate(itertools.pairwise(self.schedule)):
            _, ahead = self._ahead(segment, end - start)
            starts.append(end)
            bases.append(tuple(x + y for x, y in zip(bases[-1], ahead, strict=True)))
        return starts, bases

    def _ahead(self, segment: int, offset: int) -> tuple[int, list[int]]:
        """The source at an offset of a segment, and each source's places before it there."""
        weights = self.schedule[segment][1]
        number, row = divmod(offset, BLOCK)
        labels = _block(mix(self.seed, segment), weights, number)
        inside = np.bincount(labels[:row], minlength=len(weights))
        before = _shares(number * BLOCK, weights)
        return int(labels[row]), [x + int(y) for x, y in zip(before, inside, strict=True)]


@functools.lru_cache(maxsize=64)
def _block(seed: int, weights: tuple[float, ...], number: int) -> np.ndarray:
    """The source at each of a block's places."""
    before, after = _shares(number * BLOCK, weights), _shares((number + 1) * BLOCK, weights)
    labels = np.repeat(np.arange(len(weights)), np.subtract(after, before))
    key = np.array([seed, number], np.uint64)
    np.random.Generator(np.random.Philox(key=key)).shuffle(labels)
    return labels


def _shares(total: int, weights: tuple[float, ...]) -> list[int]:
    """`total` places in whole numbers by weight; none of them ever falls as the total grows.

    Each source takes its part of what those before it have left, rounded down.
    """
    shares, left = [], total
    rest = sum(map(Fraction, weights), Fraction(0))
    for weight in map(Fraction, weights):
        share = left * weight // rest if rest else 0
        shares.append(int(share))
        left, rest = left - int(share), rest - weight
    return shares


class Mixture:
    """Several sources as one: by index one after another, in training in a `MixtureOrder`.

    `schedule` as in `MixtureOrder`; () weighs each source by its examples, so that all come equally
    often. Raises `UserError` for an empty source, or a schedule that does not fit.
    """

    def __init__(self, sources: Mapping[str, Source], schedule: Schedule = ()) -> None:
        self.names, self.sources = tuple(sources), tuple(sources.values())
        sizes = tuple(len(source) for source in self.sources)
        for name, size in zip(self.names, sizes, strict=True):
            if not size:
                raise UserError(f"data.mixture.{name} has 0 examples: expected at least one")
        self.schedule = schedule or ((0, tuple(map(float, sizes))),)
        self._ends = tuple(itertools.accumulate(sizes))
        order = self.order(0)
        if order.num_sources != len(sizes):
            raise UserError(
                f"data.schedule={schedule}: expected {len(sizes)} weights, one for each of "
                f"{', '.join(self.names)}"
            )

    def order(self, seed: int) -> MixtureOrder:
        """The order of a run of that seed."""
        return MixtureOrder(seed, self.schedule)

    def span(self, number: int) -> tuple[int, int]:
        """(first index, examples) of a source in the whole."""
        size = len(self.sources[number])
        return self._ends[number] - size, size

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: SupportsIndex) -> Example:
        i = checked_index(index, self)
        number = bisect.bisect_right(self._ends, i)
        return self.sources[number][i - self.span(number)[0]]

    def name_at(self, index: int) -> str:
        """The name of the source that has the example of this index, which is not negative."""
        return self.names[bisect.bisect_right(self._ends, index)]

    def __repr__(self) -> str:
        pairs = zip(self.names, self.sources, strict=True)
        return f"Mixture({', '.join(f'{name}={source!r}' for name, source in pairs)})"


def parse_schedule(entries: Sequence[str], names: Sequence[str]) -> Schedule:
    """A `Schedule` from entries such as "100000:coco=3;web=1". Raises `UserError`.

    Each is the position from which on the weights hold, which are given for every name.
    """
    schedule = []
    for entry in entries:
        start, _, weights = entry.partition(":")
        pairs = [pair.partition("=")[::2] for pair in weights.split(";")]
        try:
            found = {name.strip(): float(weight) for name, weight in pairs}
            schedule.append((int(start), tuple(found.pop(name) for name in names)))
        except (ValueError, KeyError) as error:
            missing = f"no weight of {error}" if isinstance(error, KeyError) else str(error)
            example = ";".join(f"{name}=1" for name in names)
            raise UserError(
                f"data.schedule: {entry!r}: {missing}; expected POSITION:WEIGHTS such as "
                f"0:{example}"
            ) from error
        if found:
            raise UserError(
                f"data.schedule: {entry!r} weighs {', '.join(found)}, but data.mixture has "
                f"{', '.join(names)}"
            )
    return tuple(schedule)


def check_appended(before: Sequence[str], after: Sequence[str], position: int) -> None:
    """Raises `UserError` unless `after` is `before` with entries appended from `position` on.

    Args:
      before: the schedule of a run that has come to `position`, in the form of the config.
    """
    kept, added = tuple(after[: len(before)]), after[len(before) :]
    late = all(int(entry.partition(":")[0]) >= position for entry in added)
    if kept != tuple(before) or not late:
        raise UserError(
            f"data.schedule={tuple(after)}: this run has come to position {position} by "
            f"{tuple(before)}; a resume may only append entries, from {position} on"
        )
