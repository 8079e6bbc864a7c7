"""Storage that fails on purpose, below epath: at chosen calls, before, after or amid its work."""

import contextlib
import errno
import types
from collections.abc import Callable

from etils.epath import backend, gpath


class Faulty:
    """Stands for the backend of local paths. `fails(n, name)` says how the n-th call fails.

    "": it does not. "before": nothing is done. "after": all is done, but the answer is lost.
    "half": a file gets half of what is written to it. What asks whether something is there does
    not raise but answers no, as `os.path.exists` does.
    """

    def __init__(self, fails: Callable[[int, str], str] = lambda n, name: "", error=None):
        self.fails, self.calls, self.failed = fails, 0, 0
        self.error = error or (lambda: OSError(errno.EIO, "Input/output error"))
        self._real = backend.os_backend

    def __getattr__(self, name):
        real = getattr(self._real, name)

        def call(*args, **kwargs):
            how = self.fails(self.calls, name)
            self.calls += 1
            self.failed += bool(how)
            if how == "half" and name == "open":
                return self._half(real(*args, **kwargs))
            if how and name in ("exists", "isdir"):
                return False
            result = None if how in ("before", "half") else real(*args, **kwargs)
            if how:
                raise self.error()
            return result

        return call

    def _half(self, file):
        def write(content):
            file.write(content[: len(content) // 2])
            raise self.error()

        def read():
            raise self.error()

        return contextlib.closing(types.SimpleNamespace(write=write, read=read, close=file.close))


def install(monkeypatch, faulty: Faulty) -> None:
    """Puts it below epath, and below what looks at local files."""
    from capjax.training import storage

    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, None, faulty)

    def look(path) -> tuple[int, bool]:
        found = faulty.stat(path)
        return found.length, found.is_directory

    monkeypatch.setattr(storage, "_look", look)


def quick(monkeypatch) -> list[float]:
    """No pause takes any time; the pauses, in seconds."""
    from capjax.training import storage

    now, pauses = [0.0], []

    def sleep(seconds):
        pauses.append(seconds)
        now[0] += seconds

    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(storage, "time", clock)
    return pauses
