"""The curriculum of bags: which images stand in a batch, from nothing but the batch's number.

After BagCurri of Gaur et al. 2024 ("No Detail Left Behind"): a batch is made of whole bags of
images much alike (`capjax.data.bags`), and the bags grow as training goes on. An epoch is one pass
over the bags of the stage in force, in an order of its own, less the rest that fills no batch.

A global batch of B rows is cut into equal groups. Each holds as many whole bags as fit, then rows
that only fill it (`mask` False), so shapes never change; and a process that reads whole groups has
whole bags.

Letters: R rows, G bags, S images of a bag.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from capjax.data.bags import read_bags
from capjax.data.records import CorruptRecord
from capjax.data.sources import Source
from capjax.data.stream import example_index
from capjax.errors import UserError

LEVEL = "hard"


class Stage(NamedTuple):
    """Bags of `size` images of a level, in the epochs before `end_epoch`."""

    end_epoch: int
    level: str
    size: int


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Which bags an epoch is made of: those of the first stage that ends after it.

    Beyond the last stage that one goes on. Raises `UserError` for stages that are out of order.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        ends = [stage.end_epoch for stage in self.stages]
        if not ends or ends[0] < 1 or ends != sorted(set(ends)):
            raise UserError(
                f"curriculum={self}: expected stages END_EPOCH:LEVEL:SIZE, the first ending at "
                "epoch 1 or later and each of the others after that before it"
            )
        if small := [stage for stage in self.stages if stage.size < 2]:
            raise UserError(f"curriculum: {small[0]}: a bag takes at least 2 images")

    def at(self, epoch: int) -> Stage:
        """The stage of an epoch, counted from 0."""
        return next((stage for stage in self.stages if epoch < stage.end_epoch), self.stages[-1])

    def __str__(self) -> str:
        return ",".join(f"{end}:{level}:{size}" for end, level, size in self.stages)


# BagCurri as published.
PUBLISHED = Curriculum(
    tuple(
        Stage(end_epoch, LEVEL, size)
        for end_epoch, size in ((3, 2), (8, 3), (10, 5), (12, 7), (14, 10), (17, 15), (20, 20))
    )
)


def parse_curriculum(entries: Sequence[str]) -> Curriculum:
    """A curriculum from entries END_EPOCH:LEVEL:SIZE, or END_EPOCH:SIZE of the level "hard".

    Raises `UserError`.
    """
    stages = []
    for entry in entries:
        parts = entry.split(":")
        end_epoch, level, size = parts if len(parts) == 3 else (parts[0], LEVEL, parts[-1])
        if len(parts) not in (2, 3) or not (end_epoch.isdecimal() and size.isdecimal() and level):
            raise UserError(
                f"curriculum: {entry!r}: expected END_EPOCH:SIZE or END_EPOCH:LEVEL:SIZE, such as "
                "3:2 or 8:hard:3"
            )
        stages.append(Stage(int(end_epoch), level, int(size)))
    return Curriculum(tuple(stages))


class Place(NamedTuple):
    """Where a batch stands: its epoch, its number in that epoch, and the stage."""

    epoch: int
    batch: int
    stage: Stage


class BagRows(NamedTuple):
    """The rows of a batch.

    index_R: int32, of the example in the source, 0 where `mask_R` (bool) is False: such a row only
    fills the batch; bag_R: int32, the number of the bag in the global batch, for rows that fill it
    one more than the last.
    """

    index_R: np.ndarray
    mask_R: np.ndarray
    bag_R: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class BagOrder:
    """The order of bags: a pure function of the batch's number.

    Attributes:
      curriculum: which bags come when.
      bags: those of each stage's (level, size), int32 [G, S] of indices into the source.
      batch_size: rows of the global batch.
      seed: of the order in an epoch.
      groups: equal parts of the batch within which bags are whole, a multiple of the processes
        that read. The number of groups decides which rows there are, the number of processes does
        not: keep it for the whole run.

    Raises `UserError` where bags are missing or do not fit into a group.
    """

    curriculum: Curriculum
    bags: Mapping[tuple[str, int], np.ndarray]
    batch_size: int
    seed: int
    groups: int = 1

    def __post_init__(self) -> None:
        if self.groups < 1 or self.batch_size < 1 or self.batch_size % self.groups:
            raise UserError(
                f"batch_size={self.batch_size} does not divide into {self.groups} groups of whole "
                "bags; use a multiple"
            )
        for _, level, size in self.curriculum.stages:
            if size > self.batch_size // self.groups:
                raise UserError(
                    f"curriculum={self.curriculum}: a bag of {size} images does not fit into the "
                    f"{self.batch_size // self.groups} rows of a group (batch_size="
                    f"{self.batch_size}, {self.groups} groups); use a larger batch or smaller bags"
                )
            if not len(self.bags.get((level, size), ())):
                raise UserError(
                    f"curriculum={self.curriculum}: there are no bags of {size} images of level "
                    f"{level!r}; make some with `capjax data bags`"
                )

    def place(self, number: int) -> Place:
        """Where batch `number` of the run stands."""
        first_epoch = 0
        for stage in self.curriculum.stages:
            epochs, batch = divmod(number, self.batches_an_epoch(stage))
            if first_epoch + epochs < stage.end_epoch or stage is self.curriculum.stages[-1]:
                return Place(first_epoch + epochs, batch, stage)
            number -= (stage.end_epoch - first_epoch) * self.batches_an_epoch(stage)
            first_epoch = stage.end_epoch
        raise AssertionError("the last stage has no end")

    def batches_an_epoch(self, stage: Stage) -> int:
        """How many batches the bags of a stage fill; 1, filled up, where they are too few."""
        return max(1, len(self.bags[stage.level, stage.size]) // self._bags_a_batch(stage.size))

    def num_batches(self) -> int:
        """How many batches all epochs of the curriculum are."""
        first_epochs = (0, *(stage.end_epoch for stage in self.curriculum.stages))
        return sum(
            (stage.end_epoch - first) * self.batches_an_epoch(stage)
            for first, stage in zip(first_epochs, self.curriculum.stages, strict=False)
        )

    def rows(self, number: int, process_index: int = 0, process_count: int = 1) -> BagRows:
        """The rows of batch `number` that a process reads: those of its groups."""
        epoch, batch, (_, level, size) = self.place(number)
        bags_GS = self.bags[level, size]
        group_rows, a_batch = self.batch_size // self.groups, self._bags_a_batch(size)
        a_group, num_groups = a_batch // self.groups, self.groups // process_count
        shape = (num_groups, group_rows)
        index, mask = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
        bag = np.full(shape, a_batch, np.int32)
        for slot in range(num_groups * a_group):
            number_of_bag = process_index * num_groups * a_group + slot
            among = batch * a_batch + number_of_bag
            if among >= len(bags_GS):
                break
            group, place = divmod(slot, a_group)
            here = group, slice(place * size, (place + 1) * size)
            position = epoch * len(bags_GS) + among
            index[here] = bags_GS[example_index(self.seed, position, len(bags_GS))]
            mask[here], bag[here] = True, number_of_bag
        return BagRows(index.ravel(), mask.ravel(), bag.ravel())

    def _bags_a_batch(self, size: int) -> int:
        return self.groups * (self.batch_size // self.groups // size)


def bag_file(directory: epath.PathLike, level: str, size: int) -> epath.Path:
    """The file of the bags of that size and level."""
    return epath.Path(directory).expanduser() / level / f"{size}.json"


def open_bags(
    directory: epath.PathLike, curriculum: Curriculum, source: Source
) -> dict[tuple[str, int], np.ndarray]:
    """The bags of every stage, int32 [G, S] of indices into the source, as `BagOrder` takes them.

    Reads the keys of the whole source. Raises `UserError` where a file is missing or no file of
    bags, where a bag names what the source lacks or has twice, and where an image is in two bags of
    a file.
    """
    wanted = {(stage.level, stage.size) for stage in curriculum.stages}
    named = {key: _read(bag_file(directory, *key), key[1]) for key in sorted(wanted)}
    keys = source_keys(source)
    row_of, counts = {key: row for row, key in enumerate(keys)}, Counter(keys)
    opened = {}
    for (level, size), bags in named.items():
        names = [name for bag in bags for name in bag]
        if unknown := [name for name in names if name not in row_of]:
            raise UserError(
                f"{bag_file(directory, level, size)}: {len(unknown)} of {len(names)} images are "
                f"not in {source!r}, such as {unknown[0]!r}; make the bags of the source that is "
                "trained on"
            )
        if twice := [name for name in names if counts[name] > 1]:
            raise UserError(
                f"{source!r} has {counts[twice[0]]} examples of the key {twice[0]!r}, which "
                f"{bag_file(directory, level, size)} names; bags need keys that are unique"
            )
        opened[level, size] = np.array([row_of[name] for name in names], np.int32).reshape(-1, size)
    return opened


def source_keys(source: Source) -> Sequence[str]:
    """The keys of all examples, "" for one that cannot be read."""
    if (keys := getattr(source, "keys", None)) is not None:
        return keys

    def key(index: int) -> str:
        try:
            return source[index].key
        except CorruptRecord:
            return ""

    return [key(index) for index in range(len(source))]


def _read(path: epath.Path, size: int) -> list[list[str]]:
    bags = read_bags(path)
    names = [name for bag in bags for name in bag]
    if any(len(bag) != size for bag in bags) or len(set(names)) != len(names):
        raise UserError(f"{path}: expected bags of {size} images, each image in one bag at most")
    return bags
