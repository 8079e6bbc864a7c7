"""The web application: POST /caption, and a page, /health, /metrics and /model beside it."""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from capjax.data.decode import ImageError, decode_image
from capjax.decoding.loaded_model import LoadedModel
from capjax.decoding.options import DecodingOptions
from capjax.errors import UserError
from capjax.serving import parameters
from capjax.serving.batcher import Batcher
from capjax.serving.captions import Record
from capjax.serving.limits import Limits, RateLimiter
from capjax.serving.metrics import CONTENT_TYPE, Metrics
from capjax.serving.upload import read_upload

# The page is one file with its style and script inside; nothing else may run or load on it.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_IMAGE_STATUS = {"too many pixels": 413, "unsupported format": 415, "not an image": 415}
_log = logging.getLogger(__name__)


def warm_structures(captioner: LoadedModel) -> list[DecodingOptions]:
    """What is compiled before the server is ready: greedy search, and what the page asks first."""
    length = captioner.model.config.text_length
    kinds = (
        DecodingOptions(max_length=length),
        DecodingOptions(max_length=length, num_beams=4, num_captions=4),
        DecodingOptions(max_length=length, temperature=1.0, num_captions=4),
    )
    return [
        dataclasses.replace(kind, guidance_scale=scale) for kind in kinds for scale in (1.0, 2.0)
    ]


class Service:
    """The handlers, and what they share."""

    def __init__(
        self,
        captioner: LoadedModel,
        limits: Limits,
        metrics: Metrics,
        batcher: Batcher,
    ) -> None:
        self._captioner = captioner
        self._limits = limits
        self._metrics = metrics
        self._batcher = batcher
        self._rates = RateLimiter(limits.requests_per_minute, limits.burst)
        self._decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "images")
        self._in_progress: collections.Counter[str] = collections.Counter()  # by client
        self._metrics.watch(self._batcher.num_waiting, self._in_progress.total)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Starts the threads; at the end captions what still waits."""
        self._batcher.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self._batcher.close)
            self._decoders.shutdown(cancel_futures=True)

    async def caption(self, request: Request) -> Response:
        """POST /caption: the record of one image, or `error` and the reason."""
        begin = time.monotonic()
        try:
            response = JSONResponse(await self._admitted(request))
        except HTTPException as refusal:
            response = _refused(refusal.status_code, refusal.detail, refusal.headers)
        except UserError as error:
            response = _refused(422, str(error))
        except ImageError as error:
            response = _refused(_IMAGE_STATUS.get(error.reason, 422), str(error))
        except ClientDisconnect:
            response = _refused(400, "the client has gone")
        except Exception:
            _log.exception("a request failed")
            response = _refused(500, "the server failed; its log has the reason")
        self._metrics.request_done(response.status_code, time.monotonic() - begin)
        return response

    async def health(self, request: Request) -> Response:
        """GET /health: 200 where captions can be had at once."""
        if self._batcher.is_ready:
            return JSONResponse({"status": "ready"})
        status = "failed" if self._batcher.failure else "warming up"
        return JSONResponse({"status": status}, 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: Prometheus' text format."""
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def model(self, request: Request) -> Response:
        """GET /model: what is served, and its limits."""
        limits = self._limits
        return JSONResponse(
            {
                "name": str(self._captioner.config.get("name", "captioner")),
                "step": self._captioner.step,
                "image_size": self._captioner.preprocessing.image_size,
                "max_length": self._captioner.model.config.text_length,
                "has_null_image": self._captioner.has_null_image,
                "max_bytes": limits.max_bytes,
                "max_captions": limits.max_captions,
                "max_beams": limits.max_beams,
            }
        )

    async def page(self, request: Request) -> Response:
        """GET /: a page to try it on."""
        return HTMLResponse(_page(), headers=_PAGE_HEADERS)

    async def _admitted(self, request: Request) -> Record:
        if not self._batcher.is_ready:
            raise HTTPException(503, "the server is not ready yet", {"Retry-After": "5"})
        client = request.client.host if request.client else ""
        wait = self._rates.take(client)
        if wait:
            seconds = str(int(wait) + 1)
            raise HTTPException(429, "too many requests; slow down", {"Retry-After": seconds})
        if self._in_progress.total() >= self._limits.max_requests:
            raise HTTPException(503, "too many requests wait here", {"Retry-After": "1"})
        if self._in_progress[client] >= self._limits.max_requests_of_client:
            raise HTTPException(429, "too many of your requests wait here", {"Retry-After": "1"})
        self._in_progress[client] += 1
        try:
            return await self._record(request)
        finally:
            self._in_progress[client] -= 1
            self._in_progress += collections.Counter()  # forgets clients that have none

    async def _record(self, request: Request) -> Record:
        limits = self._limits
        try:
            async with asyncio.timeout(limits.timeout_s):
                upload = await read_upload(request, limits.max_bytes)
        except TimeoutError:
            raise HTTPException(408, f"no whole body within {limits.timeout_s:g} s") from None
        fields = [*request.query_params.multi_items(), *upload.fields]
        asked = parameters.parse(fields, self._captioner, limits)
        try:
            async with asyncio.timeout(limits.timeout_s):
                loop = asyncio.get_running_loop()
                image = await loop.run_in_executor(self._decoders, self._pixels, upload.image)
                self._batcher.admit(asked.options)
                return await asyncio.wrap_future(self._batcher.submit(image, asked))
        except TimeoutError:
            raise HTTPException(504, f"no caption within {limits.timeout_s:g} s") from None

    def _pixels(self, image: bytes) -> np.ndarray:
        return self._captioner.preprocessing.preprocess(
            decode_image(image, self._limits.max_pixels)
        )


def make_app(
    captioner: LoadedModel,
    limits: Limits,
    warm: Sequence[DecodingOptions] | None = None,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[], None] = lambda: None,
) -> tuple[Starlette, Batcher]:
    """The application and the batcher behind it, which starts and stops with its lifespan.

    Args:
      warm: options to compile before /health says so; None: `warm_structures`.
      on_ready, on_failure: called, in another thread, when that is done, or has failed.
    """
    warm = warm_structures(captioner) if warm is None else warm
    metrics = Metrics()
    batcher = Batcher(captioner, limits, metrics, warm, on_ready, on_failure)
    service = Service(captioner, limits, metrics, batcher)
    routes = [
        Route("/", service.page),
        Route("/caption", service.caption, methods=["POST"]),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
        Route("/model", service.model),
    ]
    return Starlette(routes=routes, lifespan=service.lifespan), batcher


def _refused(status: int, reason: str, headers=None) -> Response:
    return JSONResponse({"error": reason}, status, headers)


def _page() -> str:
    return Path(__file__).with_name("page.html").read_text("utf-8")
