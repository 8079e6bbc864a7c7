"""Saving in the background, and restoring the newest good checkpoint."""

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from capjax.checkpoint import files
from capjax.checkpoint.arrays import (
    check_digests,
    check_fit,
    named_leaves,
    read_arrays,
    state_handler,
    stored_bytes,
    stored_data,
    stored_struct,
    wrap_keys,
)
from capjax.checkpoint.digest import digest_lanes, to_hex
from capjax.checkpoint.directory import (
    absolute,
    clear_leftovers,
    discard_partial,
    list_steps,
    partial_directory,
    prune,
    publish,
    set_aside,
    step_directory,
)
from capjax.checkpoint.files import STATE, TOKENIZER_FILE, Damage, Metadata
from capjax.checkpoint.metadata import RunInfo, run_metadata, step_metadata
from capjax.checkpoint.reading import all_damaged, warn
from capjax.dims import Array
from capjax.errors import UserError
from capjax.training.patterns import nested
from capjax.training.workdir import require_free_space, write_atomic

State = TypeVar("State")
Result = TypeVar("Result")


class Checkpointer:
    """Saves the training state in the background, and restores the newest good one.

    Every process of a run makes one, and calls the same methods at the same steps.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        run: RunInfo,
        *,
        keep: int = 3,
        keep_every_steps: int = 0,
        max_failures: int = 3,
        report: Callable[[str], None] = warn,
    ):
        """Opens `directory` (made if need be) for writing; clears what a killed save left there.

        Args:
          directory: usually `<workdir>/checkpoints`.
          run: stored with every checkpoint.
          keep: so many of the newest are kept, and besides them
          keep_every_steps: those whose step is a multiple of it (0: no others).
          max_failures: so many failed saves in a row end the run.
          report: gets one line for each failed save and each damaged checkpoint.

        Raises `UserError` where the directory cannot be made or written.
        """
        for name, value, least in (
            ("keep", keep, 1),
            ("keep_every_steps", keep_every_steps, 0),
            ("max_failures", max_failures, 1),
        ):
            if value < least:
                raise UserError(f"checkpoint.{name}={value}: expected at least {least}")
        files.quiet_orbax()
        self._directory = absolute(directory)
        self._keep, self._keep_every_steps = keep, keep_every_steps
        self._max_failures, self._report = max_failures, report
        self._is_primary = jax.process_index() == 0
        self._tokenizer_model, self._run_metadata = run.tokenizer_model, run_metadata(run)
        json.dumps(self._run_metadata)  # a TypeError here and now, not in the background
        self._orbax = ocp.AsyncCheckpointer(state_handler())
        self._thread: threading.Thread | None = None
        self._outcome: tuple[int, BaseException | None] | None = None  # of the save under way
        self._failures, self._failure = 0, ""  # in a row, and the report of the last one
        if self._is_primary:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                clear_leftovers(self._directory)
            except OSError as error:
                raise UserError(
                    f"cannot write checkpoints to {self._directory} ({files.reason(error)}); "
                    "mend it, or name another workdir"
                ) from error

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Saves `state` as `step`, in place of what was there; returns before it is on disk.

        When this returns the state has been copied, and its buffers may be donated. `extra` holds
        what JSON can say, among it `examples_seen`, the position in the data; `restore_latest`
        returns it. A save that fails is reported and counted at the next call; the `max_failures`th
        in a row raises `UserError`.
        """
        if "examples_seen" not in extra:
            raise ValueError("extra must hold examples_seen, the position in the data")
        json.dumps(dict(extra))  # a TypeError here and now, not in the background
        if self._collect():
            self._report(self._failure)
        with jax.transfer_guard("allow"):
            leaves = named_leaves(jax.tree.map(jnp.asarray, state))
            arrays = {name: stored_data(leaf) for name, leaf in leaves.items()}
            lanes = digest_lanes(arrays)
            metadata = {**step_metadata(step, leaves, extra), **self._run_metadata}
            error = self._make_room(step, sum(x.nbytes for x in arrays.values()))
            if not _on_any_process(error is not None):
                try:
                    target = partial_directory(self._directory, step) / STATE
                    self._orbax.save(target, args=ocp.args.PyTreeSave(nested(arrays)))
                except Exception as trouble:
                    error = trouble
                else:
                    background = functools.partial(self._complete, step, metadata, lanes)
                    self._thread = threading.Thread(target=background)
                    self._thread.start()
                    return
            self._outcome = (step, error)

    def wait(self) -> None:
        """Waits for the save under way. Raises `UserError` where the last save failed."""
        self._collect()
        if self._failures:
            raise UserError(f"{self._failure}; mend this and run the same command again")

    def close(self) -> None:
        """Waits, and lets go of the threads. Raises as `wait`."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            if str(failure) != str(error):
                self._report(str(failure))  # the error under way matters more

    def restore_latest(self, abstract_state: State) -> tuple[int, State, dict[str, Any]] | None:
        """(step, state, extra) of the newest good checkpoint; None where there is none at all.

        `abstract_state` is a tree of `jax.ShapeDtypeStruct`s (or arrays); each array goes straight
        to the sharding given there, whatever mesh it was saved from. Damaged checkpoints newer than
        the one used are reported and renamed to `<step>.damaged`.

        Raises `UserError` where the state does not fit, or where all checkpoints are damaged.
        """
        if self._collect():
            self._report(self._failure)
        damaged: dict[int, str] = {}
        for step in reversed(list_steps(self._directory)):
            directory = step_directory(self._directory, step)
            try:
                state, extra = _restore(directory, abstract_state)
            except Damage as damage:
                damaged[step] = str(damage)
                continue
            for bad_step, problem in damaged.items():
                if self._is_primary:
                    self._report(
                        f"the checkpoint of step {bad_step} is damaged ({problem}); step {step} is "
                        f"used instead; the damaged one is {set_aside(self._directory, bad_step)}"
                    )
            return step, state, extra
        if damaged:
            raise UserError(all_damaged(self._directory, damaged))
        return None

    def _make_room(self, step: int, bytes_needed: int) -> Exception | None:
        """Removes what a failed save of `step` left; why there is no room for another, if so."""
        if self._is_primary:
            try:
                discard_partial(self._directory, step)
                require_free_space(self._directory, bytes_needed)
            except (OSError, UserError) as error:
                return error
        return None

    def _complete(self, step: int, metadata: Metadata, lanes: Mapping[str, Array]) -> None:
        """In the background: waits for Orbax, writes the rest, makes the checkpoint count."""
        try:
            self._orbax.wait_until_finished()
            if self._is_primary:
                partial = partial_directory(self._directory, step)
                if self._tokenizer_model:
                    write_atomic(partial / TOKENIZER_FILE, self._tokenizer_model)
                for name, digest in to_hex(lanes).items():
                    metadata["arrays"][name]["digest"] = digest
                metadata["files"] = files.file_entries(partial)
                files.write_metadata(partial, metadata)
                publish(self._directory, step)
                prune(self._directory, self._keep, self._keep_every_steps)
            self._outcome = (step, None)
        except BaseException as error:  # for the main thread to report
            self._outcome = (step, error)

    def _collect(self) -> bool:
        """Waits for the save under way and notes how it ended; whether it is one that failed.

        Raises `UserError` at the `max_failures`th failure in a row.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._outcome is None:
            return False
        (step, error), self._outcome = self._outcome, None
        if not _on_any_process(error is not None):
            self._failures = 0
            return False
        self._failures += 1
        if self._is_primary:
            with contextlib.suppress(OSError):
                discard_partial(self._directory, step)
        good = list_steps(self._directory)
        self._failure = (
            f"the checkpoint of step {step} could not be saved to {self._directory} "
            f"({files.reason(error) if error else 'another process failed'}), failure "
            f"{self._failures} of {self._max_failures} in a row; "
            + (f"step {good[-1]} is kept" if good else "there is no earlier one")
        )
        if self._failures >= self._max_failures:
            self.wait()
        return True


def check_disk_space(path: str | os.PathLike, abstract_state: Any, keep: int) -> None:
    """Raises `UserError` where the disk of `path` has no room for the checkpoints to come.

    While a save is under way there is one more than `keep`.
    """
    coming = max(1, keep + 1 - len(list_steps(absolute(path))))
    require_free_space(path, coming * stored_bytes(abstract_state))


def _restore(directory: epath.Path, abstract_state: State) -> tuple[State, dict[str, Any]]:
    metadata = _together(functools.partial(files.checked_metadata, directory))
    entries = metadata["arrays"]
    leaves = named_leaves(abstract_state)
    check_fit(directory, entries, leaves)
    wanted = {name: stored_struct(leaf) for name, leaf in leaves.items()}
    with jax.transfer_guard("allow"):
        arrays = _together(functools.partial(read_arrays, directory, wanted))
        check_digests(arrays, entries)
        restored = wrap_keys(arrays, entries)
    structure = jax.tree.structure(abstract_state)
    return jax.tree.unflatten(structure, list(restored.values())), metadata["extra"]


def _together(action: Callable[[], Result]) -> Result:
    """The result of `action`; `Damage` where any process met it, so that all go the same way."""
    result, damage = None, None
    try:
        result = action()
    except Damage as error:
        damage = error
    if _on_any_process(damage is not None):
        raise damage or Damage("another process could not read it")
    return result  # pyrefly: ignore[bad-return]


def _on_any_process(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
