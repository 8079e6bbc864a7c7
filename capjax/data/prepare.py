"""Preparing a source: its examples checked, shrunk and rid of duplicates, in ArrayRecord shards.

The source is cut into parts, ranges of its indices, which workers make in any order; then the
parts are copied into shards in the source's order. Every file appears whole or not at all, so the
same call goes on after any kill, and the shards' bytes depend on the source and the settings alone.
While it works, everything lies in `OUTPUT/.prepare`; `manifest.json` comes last.
"""

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from capjax.data.files import is_remote
from capjax.data.prepare_example import PrepareSettings
from capjax.data.prepare_merge import choose, name_duplicates, shard_path, write_all
from capjax.data.prepare_output import (
    MANIFEST,
    WORK,
    begin,
    finished,
    locked,
    probe,
    versions,
    write_json,
)
from capjax.data.prepare_parts import Drop, Part, atomic, make_part, read_part
from capjax.data.prepare_workers import run_all
from capjax.data.records import SHARD_SUFFIX
from capjax.data.sources import Source
from capjax.errors import UserError

DROPPED = "dropped.jsonl"
_FIRST_DROPS = 5  # of each reason in the manifest


class Report(NamedTuple):
    """How far a preparation is: `stage` "examples" or "shards", and what was dropped so far."""

    stage: str
    done: int
    total: int
    dropped: Mapping[str, int]


class Prepared(NamedTuple):
    """The manifest, and whether this call was not needed as it was there before."""

    manifest: dict[str, Any]
    was_finished: bool


def prepare(
    source: Source,
    name: str,
    output: str | os.PathLike[str],
    settings: PrepareSettings,
    *,
    num_workers: int = 1,
    max_bad: float = 0.01,
    report: Callable[[Report], None] = lambda _: None,
    part_size: int = 0,
) -> Prepared:
    """Writes the shards of `source`, called `name`, to the directory `output`, or goes on with it.

    `num_workers` processes (1: this one) and `part_size`, examples made between two savings (0:
    by the length of the source), change no byte. Raises `UserError` where more than a share
    `max_bad` of the examples is unreadable, none is left, another process writes there, or
    `output` holds something else: another source, other settings, other files.
    """
    if not 0 <= max_bad <= 1:
        raise UserError(f"max_bad={max_bad}: expected a share from 0 to 1")
    if num_workers < 1:
        raise UserError(f"num_workers={num_workers}: expected at least 1")
    if not len(source):
        raise UserError(f"{source!r} has 0 examples: expected at least one")
    if is_remote(os.fspath(output)):
        raise UserError(f"output={output}: expected a local directory; copy the shards from there")
    output = Path(output).expanduser()
    work = output / WORK
    identity = {
        "source": {"name": name, "num_examples": len(source), "probe": probe(source)},
        "settings": {**dataclasses.asdict(settings), "dedupe": sorted(settings.dedupe)},
        "versions": versions(),
    }
    if (manifest := finished(output, identity)) is not None:
        return Prepared(manifest, True)
    with locked(output):
        if (manifest := finished(output, identity)) is not None:  # while the lock was awaited
            return Prepared(manifest, True)
        size = begin(work, identity, part_size or min(max(len(source) // 1024, 64), 8192))
        starts = range(0, len(source), size)
        ranges = [(start, min(start + size, len(source))) for start in starts]
        parts = _make_parts(source, settings, work, ranges, num_workers, max_bad, report)
        merged = _merge(parts, settings, work, num_workers, report)
        manifest = {**identity, **merged}
        _publish(output, work, manifest)
    return Prepared(manifest, False)


def _make_parts(
    source: Source,
    settings: PrepareSettings,
    work: Path,
    ranges: list[tuple[int, int]],
    num_workers: int,
    max_bad: float,
    report: Callable[[Report], None],
) -> list[Part]:
    directory = work / "parts"
    found = {start: read_part(directory, start, stop) for start, stop in ranges}
    made = {start: part for start, part in found.items() if part is not None}
    missing = [(start, stop) for start, stop in ranges if start not in made]
    dropped: Counter[str] = Counter()
    done, bad = 0, 0

    def count(part: Part) -> None:
        nonlocal done, bad
        dropped.update(drop.reason for drop in part.drops)
        done, bad = done + part.stop - part.start, bad + part.num_bad
        report(Report("examples", done, len(source), dropped))
        if bad > max_bad * len(source):
            raise _too_bad(part, bad, len(source), max_bad, dropped)

    for part in made.values():
        count(part)
    report(Report("examples", done, len(source), dropped))
    for number in run_all(make_part, (source, settings, directory), missing, num_workers):
        part = read_part(directory, *missing[number])
        assert part is not None
        made[part.start] = part
        count(part)
    return [made[start] for start, _ in ranges]


def _too_bad(
    part: Part, bad: int, total: int, max_bad: float, dropped: Mapping[str, int]
) -> UserError:
    drop = next(drop for drop in part.drops if drop.is_bad)
    name = f"example {drop.index} {drop.key}".rstrip()
    return UserError(
        f"{bad} of {total} examples cannot be used, more than max_bad={max_bad} allows: "
        f"{reasons(dropped)}; {name}: {drop.reason}, {drop.detail}; mend "
        "the source, or raise max_bad and run again, which goes on from here"
    )


def reasons(dropped: Mapping[str, int]) -> str:
    """`reason 3, other reason 1`, the commonest first."""
    return ", ".join(f"{reason} {count}" for reason, count in Counter(dropped).most_common())


def _merge(
    parts: list[Part],
    settings: PrepareSettings,
    work: Path,
    num_workers: int,
    report: Callable[[Report], None],
) -> dict[str, Any]:
    """Makes the shards and `dropped.jsonl` in `work`; returns what the manifest says of them."""
    kept, duplicates = choose(parts, settings.dedupe)
    if not (work / DROPPED).exists():  # later the parts are deleted, and with them the keys
        drops = [drop for part in parts for drop in part.drops]
        drops += name_duplicates(duplicates, work / "parts")
        with atomic(work / DROPPED) as temporary, temporary.open("w", encoding="utf-8") as file:
            for drop in sorted(drops, key=lambda drop: drop.index):
                file.write(json.dumps(drop._asdict()) + "\n")
    count: Counter[str] = Counter()
    first: dict[str, list[str]] = {}
    with (work / DROPPED).open(encoding="utf-8") as file:
        for drop in (Drop(**json.loads(line)) for line in file):
            count[drop.reason] += 1
            if count[drop.reason] <= _FIRST_DROPS:
                first.setdefault(drop.reason, []).append(drop.key or f"example {drop.index}")
    if not len(kept.rows):
        raise UserError(f"no example is left: {reasons(count)}; mend them or change the settings")
    total = 0
    for done, total in write_all(
        kept, settings.shard_size, work / "parts", work / "shards", num_workers
    ):
        report(Report("shards", done, total, count))
    shards = []
    for number in range(total):
        facts = shard_path(work / "shards", number).with_suffix(".json").read_text("utf-8")
        name = f"{settings.split}-{number:05d}-of-{total:05d}{SHARD_SUFFIX}"
        shards.append({"name": name, **json.loads(facts)})
    return {
        "examples": {"in": len(kept.rows) + count.total(), "out": len(kept.rows)},
        "captions_dropped": sum(part.num_captions_dropped for part in parts),
        "dropped": {
            reason: {"count": count[reason], "first": first[reason]} for reason in sorted(count)
        },
        "shards": shards,
    }


def _publish(output: Path, work: Path, manifest: Mapping[str, Any]) -> None:
    """Gives everything its name, the manifest last."""
    for number, shard in enumerate(manifest["shards"]):
        path = shard_path(work / "shards", number)
        if path.exists():  # else a run that was killed has moved it
            path.replace(output / shard["name"])
    shutil.copyfile(work / DROPPED, output / DROPPED)
    write_json(work / MANIFEST, manifest)
    (work / MANIFEST).replace(output / MANIFEST)
    shutil.rmtree(work)
