"""What a client may ask of the server, and how often."""

import dataclasses
import time
from collections.abc import Callable

from capjax.data.decode import MAX_PIXELS
from capjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused; the status of the answer is in brackets.

    Attributes:
      max_bytes: of a request's body [413].
      max_pixels: of an image, by its header, before anything is allocated [413].
      requests_per_minute: of one client, on average [429].
      burst: requests that a client may send at once [429].
      max_requests: in progress, from a body that is being read to a caption [503].
      max_requests_of_client: the same of one client [429], so that bodies which never arrive cannot
        take all the places; 0: half of `max_requests`.
      timeout_s: for the body [408], and from the body to the captions [504].
      max_captions: `num_captions` of a request [422].
      max_beams: `num_beams` of a request [422].
      max_structures: kinds of search that are compiled, for each size of batch [422].
      batch_size: images that the device takes at once.
      wait_s: how long an image waits for others to share its batch.
    """

    max_bytes: int = 8 << 20
    max_pixels: int = 1 << 25
    requests_per_minute: float = 600.0
    burst: int = 30
    max_requests: int = 64
    max_requests_of_client: int = 0
    timeout_s: float = 30.0
    max_captions: int = 8
    max_beams: int = 8
    max_structures: int = 32
    batch_size: int = 8
    wait_s: float = 0.005

    def __post_init__(self) -> None:
        if self.max_requests_of_client == 0:
            object.__setattr__(self, "max_requests_of_client", max(1, self.max_requests // 2))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 < value < float("inf") and not (field.name == "wait_s" and value == 0):
                raise UserError(f"{field.name}={value}: expected a positive number")
        if self.max_pixels > MAX_PIXELS:
            raise UserError(f"max_pixels={self.max_pixels}: expected at most {MAX_PIXELS}")
        if self.batch_size & (self.batch_size - 1):
            raise UserError(f"batch_size={self.batch_size}: expected a power of two")


class RateLimiter:
    """A bucket of tokens a client: each request takes one, and they come back at a steady rate."""

    def __init__(
        self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second = per_minute / 60
        self._burst = burst
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # (tokens, when), the oldest first

    def take(self, client: str) -> float:
        """Seconds until this client may ask again; 0: now, and the token is taken."""
        now = self._clock()
        tokens, when = self._buckets.pop(client, (float(self._burst), now))
        tokens = min(float(self._burst), tokens + (now - when) * self._per_second)
        wait = 0.0 if tokens >= 1.0 else (1 - tokens) / self._per_second
        self._buckets[client] = (tokens if wait else tokens - 1, now)
        self._forget(now)
        return wait

    def __len__(self) -> int:
        return len(self._buckets)

    def _forget(self, now: float) -> None:
        """Drops clients whose buckets are full again, so that memory does not grow with clients."""
        full_after = self._burst / self._per_second
        while self._buckets:
            client = next(iter(self._buckets))
            if now - self._buckets[client][1] <= full_after:
                break
            del self._buckets[client]
