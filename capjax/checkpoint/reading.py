"""A finished checkpoint, read for its model, or to see whether it is good."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from etils import epath

from capjax.checkpoint.arrays import (
    check_digests,
    digest_problems,
    on_one_device,
    read_arrays,
)
from capjax.checkpoint.directory import find_steps, step_directory
from capjax.checkpoint.files import (
    TOKENIZER_FILE,
    Damage,
    Metadata,
    checked_metadata,
    file_problems,
    first_of,
    read_metadata,
)
from capjax.dims import Params
from capjax.errors import UserError
from capjax.training.lora import LORA, merge
from capjax.training.patterns import nested
from capjax.training.storage import read_bytes, warn

Found = TypeVar("Found")


class LoadedCheckpoint(NamedTuple):
    """A checkpoint's parameters (nested dict, on one device), and what goes with them.

    Where the run adapted kernels (`capjax.training.lora`), they are merged.
    """

    params: Params
    metadata: Metadata
    tokenizer_model: bytes  # empty where the run had no tokenizer
    step: int


def load_params(path: str | os.PathLike) -> LoadedCheckpoint:
    """The parameters of a checkpoint, verified, without the optimizer's state.

    Where the run kept an average of its parameters over time, they are that average.

    `path` is a workdir, its `checkpoints`, or one checkpoint in it; of several the newest good one
    is taken, and damaged newer ones are reported on stderr. The arrays lie on this process's first
    device. Raises `UserError` where nothing good is found.
    """
    return _newest(path, _load, warn)


def load_types(path: str | os.PathLike) -> LoadedCheckpoint:
    """What `load_params` would load, with the types of the parameters in the place of arrays.

    No array is read, and of damage only that which the files' sizes and hashes tell is seen. Raises
    as `load_params`.
    """
    return _newest(path, _load_types, lambda line: None)


def _newest(
    path: str | os.PathLike, read: Callable[[epath.Path], Found], report: Callable[[str], None]
) -> Found:
    """What `read` makes of the newest good checkpoint; it raises `Damage` for one that is not."""
    directory, steps = find_steps(path)
    damaged: dict[int, str] = {}
    for step in reversed(steps):
        try:
            found = second_look(functools.partial(read, step_directory(directory, step)))
        except Damage as damage:
            damaged[step] = str(damage)
            continue
        for bad_step, problem in damaged.items():
            report(
                f"the checkpoint of step {bad_step} in {directory} is damaged ({problem}); "
                f"step {step} is used instead"
            )
        return found
    raise UserError(all_damaged(directory, damaged))


def _load(directory: epath.Path) -> LoadedCheckpoint:
    metadata = checked_metadata(directory)
    entries = _entries(metadata)
    arrays = read_arrays(directory, on_one_device(entries))
    check_digests(arrays, entries)
    (params,) = nested(arrays).values()
    if LORA in params:
        lora = metadata["config"]["lora"]
        params = merge(params, lora["alpha"] / lora["rank"])
    return _loaded(directory, metadata, params)


def _load_types(directory: epath.Path) -> LoadedCheckpoint:
    metadata = checked_metadata(directory)
    (params,) = nested(on_one_device(_entries(metadata))).values()
    return _loaded(directory, metadata, merge(params, 0.0))


def _entries(metadata: Metadata) -> dict[str, Any]:
    """The arrays that hold parameters: those of the average, where there is one."""
    tops = {name.partition("/")[0] for name in metadata["arrays"]}
    top = "ema" if "ema" in tops else "params"
    return {k: e for k, e in metadata["arrays"].items() if k.startswith(f"{top}/")}


def _loaded(directory: epath.Path, metadata: Metadata, params: Params) -> LoadedCheckpoint:
    has_tokenizer = TOKENIZER_FILE in metadata["files"]
    return LoadedCheckpoint(
        params=params,
        metadata=metadata,
        tokenizer_model=read_bytes(directory / TOKENIZER_FILE) if has_tokenizer else b"",
        step=metadata["step"],
    )


def verify(directory: epath.Path, step: int) -> list[str]:
    """Reads every byte of a checkpoint; what is wrong with it, a line each (none: it is good).

    Holds one array at a time. Raises `UserError` for a format that this version does not read.
    """
    checkpoint = step_directory(directory, step)
    try:
        metadata = read_metadata(checkpoint)
    except Damage as damage:
        return [str(damage)]
    entries = metadata["arrays"]
    problems = file_problems(checkpoint, metadata)
    unreadable = []
    for name, struct in on_one_device(entries).items():
        try:
            problems += digest_problems(read_arrays(checkpoint, {name: struct}), entries)
        except Damage as damage:
            unreadable.append(f"array {name}: {damage}")
    return [*problems, first_of(unreadable)] if unreadable else problems


def second_look(read: Callable[[], Found]) -> Found:
    """What `read` returns; where it raises `Damage` it is asked once more.

    Below us, in Orbax, storage that does not answer looks like files that are not there. Asked
    again, `read` begins with our own look at the files, which waits until the storage answers.
    """
    try:
        return read()
    except Damage:
        return read()


def all_damaged(directory: epath.Path, problems: Mapping[int, str]) -> str:
    """The error where no checkpoint is good: step -> what is wrong with it."""
    listed = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
    return f"no good checkpoint in {directory} ({listed}); put one back, or name another workdir"
