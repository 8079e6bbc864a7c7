"""A chat endpoint as OpenAI's, asked until it answers: the standard library's HTTP, with retries.

llama.cpp, vLLM, Ollama, SGLang and most providers serve it: POST `/chat/completions`.
"""

import email.utils
import http.client
import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable
from urllib.parse import urlsplit

from capjax.errors import UserError

LONGEST_PAUSE_S = 600.0  # of those that a server asks for
_LONGEST_BACKOFF_S = 60.0
_LARGEST_ANSWER = 1 << 22  # bytes
_WRONG_FOR_ALL = (*range(300, 400), 401, 403, 404, 405)  # whatever is asked
_FOR_THE_MOMENT = (408, 409, 425, 429)  # and all from 500


class Reply(NamedTuple):
    """The text, why it ended ("stop", "length", …), and tokens read and written (0: not told)."""

    text: str
    finish: str = ""
    num_prompt_tokens: int = 0
    num_tokens: int = 0


class RequestFailed(Exception):  # noqa: N818 (a state of one request, counted)
    """A request that got no answer; the message says why."""


@runtime_checkable
class Chat(Protocol):
    """What answers requests of several threads: an `Endpoint`, or a model on this machine."""

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """Raises `RequestFailed` where there is no answer."""
        ...

    def stop(self) -> None:
        """From here on nothing is answered but what has been sent."""
        ...


class Endpoint:
    """Where to ask. Threads may share it: a server that asks for patience gets it from all.

    Args:
      url: without `/chat/completions`, such as `http://localhost:8080/v1`.
      key: sent as a bearer token, "" for none; it is in no message.
      timeout_s: for a whole answer.
      max_retries: after errors that may pass, with pauses of `backoff_s` doubling up to a minute.

    Raises `UserError` for a URL or a key that is none.
    """

    def __init__(
        self,
        url: str,
        key: str = "",
        *,
        timeout_s: float = 120.0,
        max_retries: int = 6,
        backoff_s: float = 1.0,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise UserError(f"endpoint={url}: expected a URL such as http://localhost:8080/v1")
        if not key.isascii() or (key and not key.isprintable()):
            raise UserError("the key of the endpoint: expected printable ASCII characters")
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.timeout_s, self.max_retries, self.backoff_s = timeout_s, max_retries, backoff_s
        self._key, self._opener = key, urllib.request.build_opener(_NoRedirect)
        self._has_answered, self._resume_at = False, 0.0
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Gives up all that waits; what has been sent is waited for."""
        self._stopped.set()

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """The answer to one request.

        Raises `RequestFailed` where there is none, and `UserError` where there will be none for any
        other request either.
        """
        data = json.dumps(body).encode()
        reason = "stopped"
        for attempt in range(self.max_retries + 1):
            while (pause := self._resume_at - time.monotonic()) > 0 and not self._stopped.is_set():
                self._stopped.wait(pause)
            if self._stopped.is_set():
                break
            try:
                reply = _parse(self._post(data))
                self._has_answered = True
                return reply
            except urllib.error.HTTPError as error:
                reason = self._explain(error)
                pause = _retry_after(error.headers.get("Retry-After", ""))
                if pause:  # nobody else is served either
                    self._resume_at = max(self._resume_at, time.monotonic() + pause)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = self._unreachable(error)
            if attempt < self.max_retries:
                backoff = min(self.backoff_s * 2**attempt, _LONGEST_BACKOFF_S)
                self._stopped.wait(backoff * random.uniform(0.5, 1.0))
        raise RequestFailed(reason)

    def _post(self, data: bytes) -> bytes:
        request = urllib.request.Request(f"{self.url}/chat/completions", data)
        request.add_header("Content-Type", "application/json")
        if self._key:
            request.add_header("Authorization", f"Bearer {self._key}")
        deadline = time.monotonic() + self.timeout_s
        found = bytearray()
        with self._opener.open(request, timeout=self.timeout_s) as response:
            while piece := response.read1(1 << 16):
                found += piece
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer in {self.timeout_s:g} s")
                if len(found) > _LARGEST_ANSWER:
                    raise ValueError(f"an answer of more than {_LARGEST_ANSWER} bytes")
        return bytes(found)

    def _explain(self, error: urllib.error.HTTPError) -> str:
        """What the server says; raises where asking again is of no use."""
        try:
            said = error.read(2000).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            said = ""
        finally:
            error.close()
        said = " ".join((said.replace(self._key, "***") if self._key else said).split())
        reason = f"HTTP {error.code} {error.reason}: {said[:300]}".rstrip(": ")
        if error.code in _WRONG_FOR_ALL:
            raise UserError(
                f"endpoint={self.url}: {reason}; check the URL, the model's name and the key"
            )
        if error.code not in _FOR_THE_MOMENT and error.code < 500:
            raise RequestFailed(reason)
        return reason

    def _unreachable(self, error: Exception) -> str:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ConnectionRefusedError | socket.gaierror) and not self._has_answered:
            raise UserError(
                f"endpoint={self.url}: no server there ({cause}); start it, or check the URL"
            )
        return f"{type(cause).__name__}: {cause}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would lose its body; a 3xx is an error."""

    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        """None: not followed."""


def _parse(data: bytes) -> Reply:
    """Raises ValueError for what is no chat completion."""
    try:
        found = json.loads(data)
        choice, usage = found["choices"][0], found.get("usage") or {}
        text, finish = choice["message"]["content"] or "", choice.get("finish_reason") or ""
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        if not isinstance(text, str) or not isinstance(finish, str):
            raise TypeError("its content is no text")
        return Reply(text, finish, *tokens)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"not a chat completion: {data[:80]!r}") from error


def _retry_after(told: str) -> float:
    """Seconds that the server asks to wait; 0 where it asks for none."""
    try:
        seconds = float(told)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(told).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_PAUSE_S) if seconds == seconds else 0.0
