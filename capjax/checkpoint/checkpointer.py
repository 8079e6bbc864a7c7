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
    publish,
    set_aside,
    step_directory,
)
from capjax.checkpoint.files import STATE, TOKENIZER_FILE, Damage, Metadata
from capjax.checkpoint.keeping import DEFAULT, Keep
from capjax.checkpoint.metadata import RunInfo, run_metadata, step_metadata
from capjax.checkpoint.reading import all_damaged, second_look
from capjax.dims import Array
from capjax.errors import StorageError, UserError
from capjax.training.patterns import nested
from capjax.training.storage import patiently, reason, warn
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
        keep: Keep = DEFAULT,
        max_failures: int = 3,
        report: Callable[[str], None] = warn,
    ):
        """Opens `directory` (made if need be) for writing; clears what a killed save left there.

        Args:
          directory: usually `<workdir>/checkpoints`.
          run: stored with every checkpoint.
          keep: which checkpoints outlive the next save.
          max_failures: so many failed saves in a row end the run.
          report: gets a line for each failed save, each damaged checkpoint, and each time that
            storage failed and is tried again (from a thread, of a save).

        Raises `UserError` where the directory cannot be made or written.
        """
        files.quiet_orbax()
        self._directory = absolute(directory)
        self._keep, self._max_failures, self._report = keep, max_failures, report
        self._unknown_metric = ""  # what was said of the metric of the best
        self._is_primary = jax.process_index() == 0
        self._tokenizer_model, self._run_metadata = run.tokenizer_model, run_metadata(run)
        json.dumps(self._run_metadata)  # a TypeError here and now, not in the background
        self._orbax = ocp.AsyncCheckpointer(state_handler())
        self._thread: threading.Thread | None = None
        self._outcome: tuple[int, BaseException | None] | None = None  # of the save under way
        self._failures, self._failure = 0, ""  # in a row, and the report of the last one
        if self._is_primary:
            try:
                self._patiently("opening", self._open)
            except StorageError:
                raise
            except OSError as error:
                raise UserError(
                    f"cannot write checkpoints to {self._directory} ({reason(error)}); "
                    "mend it, or name another workdir"
                ) from error

    def _open(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        clear_leftovers(self._directory)

    def _patiently(self, doing: str, action: Callable[[], Result]) -> Result:
        return patiently(action, f"{doing} {self._directory}", self._report)

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Saves `state` as `step`, in place of what was there; returns before it is on disk.

        When this returns the state has been copied, and its buffers may be donated. `extra` holds
        what JSON can say, among it `examples_seen`, the position in the data, and perhaps
        `metrics`, what was measured of this state by name; `restore_latest` returns it. A save that
        fails is reported and counted at the next call; the `max_failures`th in a row raises
        `UserError`.
        """
        if "examples_seen" not in extra:
            raise ValueError("extra must hold examples_seen, the position in the data")
        json.dumps(dict(extra))  # a TypeError here and now, not in the background
        unknown = self._keep.unknown(extra.get("metrics", {}))
        if unknown != self._unknown_metric and unknown:
            self._report(f"warning: {unknown}")
        self._unknown_metric = unknown or self._unknown_metric
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
        for step in reversed(_together(functools.partial(list_steps, self._directory))):
            directory = step_directory(self._directory, step)
            try:
                state, extra = second_look(functools.partial(_restore, directory, abstract_state))
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
        """Makes the directory for a save of `step`, free of what a failed one left.

        Returns why it cannot be saved there, if so: Orbax would meet it in the background.
        """
        partial = partial_directory(self._directory, step)
        if self._is_primary:
            try:
                self._patiently("clearing", lambda: discard_partial(self._directory, step))
                require_free_space(self._directory, bytes_needed)
                self._patiently("opening", lambda: partial.mkdir(parents=True, exist_ok=True))
            except Exception as error:  # stores have errors of their own
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
                self._patiently("naming a checkpoint in", lambda: publish(self._directory, step))
        except BaseException as error:  # for the main thread to report
            self._outcome = (step, error)
            return
        if self._is_primary:
            with contextlib.suppress(Exception):  # the save is good; it is tried after the next
                self._keep.prune(self._directory)
        self._outcome = (step, None)

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
            with contextlib.suppress(Exception):  # `save` tries it again
                discard_partial(self._directory, step)
        try:
            good = list_steps(self._directory)
            kept = f"step {good[-1]} is kept" if good else "there is no earlier one"
        except Exception as unseen:
            kept = f"what is kept there cannot be seen ({reason(unseen)})"
        self._failure = (
            f"the checkpoint of step {step} could not be saved to {self._directory} "
            f"({reason(error) if error else 'another process failed'}), failure "
            f"{self._failures} of {self._max_failures} in a row; {kept}"
        )
        if self._failures >= self._max_failures:
            self.wait()
        return True


def check_disk_space(path: str | os.PathLike, abstract_state: Any, kept: int) -> None:
    """Raises `UserError` where the disk of `path` has no room for the checkpoints to come.

    While a save is under way there is one more than are `kept`.
    """
    coming = max(1, kept + 1 - len(list_steps(absolute(path))))
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
    """The result of `action`; where any process met an error, all go the same way.

    An error that does not say what the files are worth (`UserError`: they could not be reached)
    goes before `Damage`: no checkpoint is set aside for it.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as trouble:
        error = trouble
    if _on_any_process(error is not None and not isinstance(error, Damage)):
        if error is None or isinstance(error, Damage):
            error = UserError("another process could not read the checkpoint; it says why")
        raise error
    if _on_any_process(error is not None):
        raise error or Damage("another process could not read it")
    return result  # pyrefly: ignore[bad-return]


def _on_any_process(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
