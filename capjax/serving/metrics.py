"""What the server counts, in Prometheus' text format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = {"registry": self._registry}
        self._requests = Counter(
            "capjax_requests", "Requests for captions, by HTTP status.", ["status"], **registry
        )
        self._seconds = Histogram(
            "capjax_request_seconds",
            "From a request's first byte to its answer, where it was captioned.",
            buckets=_SECONDS,
            **registry,
        )
        self._batches = Histogram(
            "capjax_batch_images",
            "Images of a batch, padding left out.",
            buckets=_SIZES,
            **registry,
        )
        self._padding = Counter("capjax_padding_rows", "Rows that only filled a batch.", **registry)
        self._captions = Counter("capjax_captions", "Captions written.", **registry)
        self._device_seconds = Counter(
            "capjax_device_seconds", "Spent on batches, compilation included.", **registry
        )
        self._waiting = Gauge("capjax_waiting_images", "Images that wait for a batch.", **registry)
        self._in_progress = Gauge(
            "capjax_requests_in_progress", "Requests that are read or wait.", **registry
        )
        self.structures = Gauge(
            "capjax_compiled_structures", "Kinds of search that were asked for.", **registry
        )

    def watch(self, waiting: Callable[[], int], in_progress: Callable[[], int]) -> None:
        """Where the two gauges of the queue are read from."""
        self._waiting.set_function(waiting)
        self._in_progress.set_function(in_progress)

    def request_done(self, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(status).inc()
        if status == 200:
            self._seconds.observe(seconds)

    def batch_done(self, images: int, rows: int, captions: int, seconds: float) -> None:
        """A batch of `rows`, `images` of them not padding, has left the device."""
        self._batches.observe(images)
        self._padding.inc(rows - images)
        self._captions.inc(captions)
        self._device_seconds.inc(seconds)

    def text(self) -> bytes:
        """All of them as a page for a scraper."""
        return generate_latest(self._registry)
