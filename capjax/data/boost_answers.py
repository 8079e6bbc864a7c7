"""Answers that were paid for: a file of JSON lines, to which one is added for each request."""

import errno
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from capjax.data.boost_endpoint import Reply, RequestFailed
from capjax.errors import UserError

_NUM_CLAIMS = 1024
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


def request_id(body: Mapping[str, Any]) -> str:
    """The hash of all that an answer depends on: model, prompt with the captions, parameters."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Answers:
    """The answers of a file, by `request_id`; threads may share it, processes may not.

    A last line that a killed process left without its end is cut off; a damaged one is
    counted, and taken as not there. Raises `UserError` where another process writes the file.
    """

    def __init__(self, path: Path) -> None:
        self.num_asked = self.num_prompt_tokens = self.num_tokens = 0  # by this object
        self.num_damaged = 0
        self._found: dict[str, Reply] = {}
        self._lock = threading.Lock()
        self._claims = [threading.Lock() for _ in range(_NUM_CLAIMS)]
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                self._file.close()
                raise UserError(
                    f"{path} is being written by another process; wait for it, stop it, or choose "
                    "another output"
                ) from None
        self._read(path)

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Everything on disk for good; another process may write."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def get(self, body: Mapping[str, Any], ask: Callable[[Mapping[str, Any]], Reply]) -> Reply:
        """The answer to a request, asked for only if it is not there; and then kept.

        Of threads that want the same answer one asks. Raises what `ask` does.
        """
        name = request_id(body)
        with self._claims[int(name[:8], 16) % _NUM_CLAIMS]:
            if name in self._found:
                return self._found[name]
            reply = ask(body)
            line = json.dumps({"id": name, **reply._asdict()}) + "\n"
            with self._lock:
                self._file.write(line.encode())
                self._found[name] = reply
                self.num_asked += 1
                self.num_prompt_tokens += reply.num_prompt_tokens
                self.num_tokens += reply.num_tokens
        return reply

    def known(self, body: Mapping[str, Any]) -> Reply:
        """The answer to a request. Raises `RequestFailed` where there is none."""
        try:
            return self._found[request_id(body)]
        except KeyError:
            raise RequestFailed("not answered") from None

    def _read(self, path: Path) -> None:
        whole = 0
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    self._file.truncate(whole)
                    break
                whole += len(line)
                try:
                    fields = json.loads(line)
                    name = fields.pop("id")
                    self._found[name] = Reply(**fields)
                except (ValueError, KeyError, TypeError, AttributeError):
                    self.num_damaged += 1
