"""A run's directory of checkpoints: names, and changes that a kill cannot leave half made.

    00000700           a checkpoint
    00000800.partial   a save under way, or what a killed one left
    00000100.removed   one that is being deleted
    00000600.damaged   set aside by a restore; never touched again

A store without atomic renames (`gs://`) gets each save in place; a directory there is a checkpoint
once it has its metadata, the file that is written last and deleted first.
"""

import contextlib
import itertools
import os
import re
from pathlib import Path

from etils import epath

from capjax.checkpoint.files import METADATA_FILE
from capjax.errors import UserError
from capjax.training.storage import exists, is_remote, listing


def absolute(path: str | os.PathLike) -> epath.Path:
    """An absolute path, as Orbax wants it; `gs://` and the like as they are."""
    if is_remote(path):
        return epath.Path(path)
    return epath.Path(Path(path).expanduser().resolve())


def step_directory(directory: epath.Path, step: int) -> epath.Path:
    """Where `directory` keeps the checkpoint of `step`."""
    return directory / f"{step:08d}"


def partial_directory(directory: epath.Path, step: int) -> epath.Path:
    """Where the checkpoint of `step` is written before it counts."""
    final = step_directory(directory, step)
    return final if is_remote(directory) else directory / f"{final.name}.partial"


def list_steps(directory: epath.Path) -> list[int]:
    """The steps that have a checkpoint, damaged or not, in rising order.

    Raises `StorageError` where that cannot be seen: it is not the same as none.
    """
    found = [p for p in listing(directory) if re.fullmatch(r"\d{8,}", p.name)]
    return sorted(int(p.name) for p in found if not is_remote(p) or exists(p / METADATA_FILE))


def find_steps(path: str | os.PathLike) -> tuple[epath.Path, list[int]]:
    """(directory, steps) meant by a workdir, its `checkpoints`, or one checkpoint in it.

    Raises `UserError` where there is no checkpoint, `StorageError` as `list_steps`.
    """
    given = absolute(path)
    if re.fullmatch(r"\d{8,}", given.name) and exists(given):
        return given.parent, [int(given.name)]
    for directory in (given / "checkpoints", given):
        steps = list_steps(directory)
        if steps:
            return directory, steps
    was = "" if exists(given) else " (there is no such directory)"
    raise UserError(
        f"no checkpoint in {given}{was}; expected a workdir, its checkpoints/, or one of these, "
        "such as checkpoints/00000700"
    )


def publish(directory: epath.Path, step: int) -> None:
    """Gives a complete save its name; an older checkpoint of the same step makes way.

    It may be done again where the answer to the first time was lost.
    """
    partial, final = partial_directory(directory, step), step_directory(directory, step)
    if partial != final and exists(partial):
        removed = _hide(final)
        partial.rename(final)
        _delete(removed)


def delete(directory: epath.Path, step: int) -> None:
    """Deletes a checkpoint, which stops counting first."""
    _delete(_hide(step_directory(directory, step)))


def discard_after(directory: epath.Path, step: int) -> None:
    """Deletes the checkpoints of later steps, the newest first."""
    for later in reversed(list_steps(directory)):
        if later > step:
            delete(directory, later)


def set_aside(directory: epath.Path, step: int) -> epath.Path:
    """Renames a damaged checkpoint, so that its step can be saved anew; returns where it is."""
    final = step_directory(directory, step)
    names = (f"{final.name}.damaged{n}" for n in itertools.chain([""], itertools.count(2)))
    aside = next(path for path in map(directory.__truediv__, names) if not exists(path))
    if not is_remote(directory):
        with contextlib.suppress(OSError):  # where nothing can be written, the good is still read
            return final.rename(aside)
    return final


def clear_leftovers(directory: epath.Path) -> None:
    """Deletes half-written and half-deleted checkpoints; names one that only lacks its name."""
    for path in listing(directory):
        if path.name.endswith(".partial") and exists(path / METADATA_FILE):
            publish(directory, int(path.name.removesuffix(".partial")))
        elif path.name.endswith((".partial", ".removed")):
            _delete(path)


def discard_partial(directory: epath.Path, step: int) -> None:
    """Deletes what there is of an unfinished save: it is of no use, and the disk may be full."""
    _delete(partial_directory(directory, step))


def _hide(final: epath.Path) -> epath.Path:
    """Makes a checkpoint, if there is one, stop counting at once; returns what is left of it."""
    if is_remote(final):
        (final / METADATA_FILE).unlink(missing_ok=True)
        return final
    removed = final.parent / f"{final.name}.removed"
    _delete(removed)
    return final.rename(removed) if exists(final) else removed


def _delete(path: epath.Path) -> None:
    if is_remote(path):  # what is left of a deletion that fails must not count
        (path / METADATA_FILE).unlink(missing_ok=True)
    if exists(path):
        path.rmtree(missing_ok=True)
