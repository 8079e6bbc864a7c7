"""The directory of one run: one writer at a time, one configuration, whole files only.

On local paths a lock that dies with its process refuses a second writer. Object stores have no such
lock: there nothing is locked, and two runs writing one `gs://` workdir is the user's to avoid.
"""

import dataclasses
import errno
import fcntl
import fnmatch
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from capjax.errors import StorageError, UserError
from capjax.training.storage import exists, is_directory, is_remote, patiently, read_bytes

_ABSENT = object()
_held_locks: set[int] = set()
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


@dataclasses.dataclass(frozen=True)
class Workdir:
    """An open workdir. The lock is held until `close`, or until the process ends in any way.

    `is_new` says that no run was here before; `changes` lists what differs, "field: old -> new".
    """

    path: epath.Path
    is_new: bool
    changes: tuple[str, ...] = ()
    lock: int | None = None

    def close(self) -> None:
        """Lets another process write here."""
        if self.lock in _held_locks:
            _held_locks.remove(self.lock)
            os.close(self.lock)

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_workdir(
    path: epath.PathLike,
    config: Mapping[str, Any],
    may_change: Sequence[str] = (),
    what_counts: Callable[[Any], Any] = lambda value: value,
    defaults: Mapping[str, Any] | None = None,
) -> Workdir:
    """Opens `path` for writing: makes it, or resumes the run that is in it.

    `config` is the resolved configuration (nested, JSON values); it is kept in `config.json`. Where
    one is there already, only fields that match a glob of `may_change` ("log_every_steps",
    "checkpoint.*") may differ, those of which `what_counts` is equal, and those that the kept one
    lacks, because the field is newer than it, and that have their value in `defaults` (nested too);
    their new values are written. Processes other than the first change and check nothing.

    Raises `UserError` where another process writes here, another field differs, or the path cannot
    be a workdir; an error leaves no new workdir behind.
    """
    import jax  # only here: who reads a run's files, or writes one, need not wait for it

    root = epath.Path(path).expanduser()
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if jax.process_index() != 0:
        return Workdir(root, is_new=False)
    is_fresh_directory = not exists(root)
    _check_usable(root)

    def allowed_changes() -> tuple[str, ...] | None:
        if not exists(root / "config.json"):
            return None
        return _allowed_changes(root, json.loads(text), may_change, what_counts, defaults or {})

    lock = None
    try:
        allowed_changes()  # before a byte is written; again below, when nobody else writes
        root.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(root)
        changes = allowed_changes()
        is_new = changes is None
        if is_new or changes:
            write_atomic(root / "config.json", text)
    except BaseException as error:
        if is_fresh_directory and lock is not None:
            root.rmtree()  # ours alone: it was made above, and locked ever since
        Workdir(root, is_new=False, lock=lock).close()
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise UserError(f"workdir={root}: {error.strerror or error}; choose another") from error
        raise
    return Workdir(root, is_new, changes or (), lock)


def _check_usable(root: epath.Path) -> None:
    if exists(root) and not is_directory(root):
        raise UserError(f"workdir={root} is a file; expected a directory, or a path to make one at")
    if exists(root / "config.json"):
        return
    for name in ("checkpoints", "metrics.jsonl"):
        if exists(root / name):
            raise UserError(
                f"workdir={root} holds {name} but no config.json, so it cannot be resumed; "
                "choose another --workdir, or put its config.json back"
            )


def _take_lock(root: epath.Path) -> int | None:
    """Locks the workdir for this process; None where the file system has no locks."""
    if is_remote(root):
        return None
    lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(lock)
        raise UserError(
            f"workdir={root} is being written by {holder}; wait for it, stop it, "
            "or choose another --workdir"
        ) from None
    except OSError as error:
        os.close(lock)
        if error.errno in _NO_LOCKS_HERE:
            return None
        raise
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held_locks.add(lock)
    return lock


def _close_locks_in_child() -> None:
    """A forked data worker shares the lock, and must not hold it on after its parent was killed."""
    while _held_locks:
        os.close(_held_locks.pop())


os.register_at_fork(after_in_child=_close_locks_in_child)


def _allowed_changes(
    root: epath.Path,
    config: dict,
    may_change: Sequence[str],
    what_counts: Callable[[Any], Any],
    defaults: Mapping[str, Any],
) -> tuple[str, ...]:
    """What differs from the kept configuration. Raises `UserError` unless all of it may."""
    try:
        kept = json.loads(read_bytes(root / "config.json"))
    except ValueError as error:
        message = f"{root / 'config.json'} is damaged ({error}); choose another --workdir"
        raise UserError(message) from error
    changes, before, after = config_changes(kept, config), _flatten(kept), _flatten(config)
    usual = _flatten(defaults)
    refused = [
        f"{field}: {change}"
        for field, change in changes.items()
        if not any(fnmatch.fnmatchcase(field, pattern) for pattern in may_change)
        and what_counts(before.get(field, usual.get(field, _ABSENT)))
        != what_counts(after.get(field, _ABSENT))
    ]
    if refused:
        raise UserError(
            f"workdir={root} holds a run with another configuration ({'; '.join(refused)}); "
            "run it with the same configuration, or choose another --workdir"
        )
    return tuple(f"{field}: {change}" for field, change in changes.items())


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Field (dotted) -> "old -> new" for every field that differs between two configurations."""
    before, after = _flatten(old), _flatten(new)
    return {
        field: f"{_show(before.get(field, _ABSENT))} -> {_show(after.get(field, _ABSENT))}"
        for field in sorted(before | after)
        if before.get(field, _ABSENT) != after.get(field, _ABSENT)
    }


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)


def write_atomic(path: epath.PathLike, data: bytes | str) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part.

    An `OSError`, of a full disk say, names the file. Storage that fails for a while is waited for.
    """
    data = data.encode() if isinstance(data, str) else data
    write = _write_whole if is_remote(path) else _write_local
    patiently(lambda: write(path, data), f"writing {path}")


def _write_whole(path: epath.PathLike, data: bytes) -> None:
    epath.Path(path).write_bytes(data)  # a store shows an object only once it is whole


def _write_local(path: epath.PathLike, data: bytes) -> None:
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), os.fspath(target)) from error
    finally:
        temporary.unlink(missing_ok=True)


def require_free_space(path: epath.PathLike, bytes_needed: int) -> None:
    """Raises `UserError` where the disk of `path` (which need not exist) has less than needed."""
    if is_remote(path):
        return
    place = Path(path).expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        raise UserError(
            f"{path}: {_gigabytes(bytes_needed)} needed on disk, {_gigabytes(free)} free; "
            "free some space, or choose a path on another disk"
        )


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e7 else f"{number / 1e6:.2f} MB"
