"""`capjax serve`: a checkpoint behind HTTP, with a page to try it on."""

import argparse
import logging
import signal
import socket
import sys
import time

from capjax.commands import checkpoint_flags
from capjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint, where to listen, and what clients may ask."""
    parser.description = f"""{parser.description}

  POST /caption  an image as the body, or in a multipart form; as query or form fields
                 guidance_scale, num_captions, temperature, top_p, num_beams, max_length, prefix,
                 seed and key. Answers with a caption record as JSON, or 4xx and "error".
  GET  /         a page: drop an image, move the guidance slider
  GET  /health   200 when every program is compiled      /metrics  Prometheus' text
  GET  /model    what is served

Guidance (guidance_scale other than 1) needs a model that has learnt to write without an image:
after training without image_dropout (config.objective.captioning.image_dropout) its effect is weak
and often bad. The server says so at its start, on its page and in /model ("has_null_image").
One device serves; there is no encryption and no login, so leave --host as it is, or put a proxy
in front. SIGTERM finishes what is in progress."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's workdir (its newest checkpoint), or one checkpoint directory",
    )
    checkpoint_flags.add_step(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one (default 8000)")
    batches = parser.add_argument_group("batches")
    batches.add_argument(
        "--batch_size", type=int, default=8, metavar="N", help="most images, a power of two (8)"
    )
    batches.add_argument(
        "--wait_ms", type=float, default=5.0, metavar="MS", help="wait for others this long (5)"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max_megabytes", type=int, default=8, metavar="MB", help="of a body: 413 (8)"
    )
    limits.add_argument(
        "--max_megapixels", type=int, default=32, metavar="MP", help="of an image: 413 (32)"
    )
    limits.add_argument(
        "--requests_per_minute", type=float, default=600.0, metavar="R", help="a client: 429 (600)"
    )
    limits.add_argument(
        "--max_requests", type=int, default=64, metavar="N", help="in progress: 503 (64)"
    )
    limits.add_argument(
        "--max_requests_of_client",
        type=int,
        default=0,
        metavar="N",
        help="the same of one client: 429 (0: half of it)",
    )
    limits.add_argument(
        "--timeout", type=float, default=30.0, metavar="S", help="of a request: 504 (30)"
    )
    limits.add_argument(
        "--trusted_proxy",
        metavar="ADDRESS",
        help="believe this address's X-Forwarded-For when clients are told apart (default: none)",
    )


def run(args: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT. Raises `UserError` for input that is wrong."""
    from capjax.data.decode import optional_module

    for name in ("uvicorn", "starlette", "python_multipart", "prometheus_client"):
        if optional_module(name) is None:
            raise UserError(f"capjax serve needs {name}: pip install 'capjax[serve]'")
    if args.num_processes is not None:
        raise UserError("capjax serve is one process on one device; leave --num_processes out")
    from capjax.serving.limits import Limits

    limits = Limits(
        max_bytes=args.max_megabytes << 20,
        max_pixels=args.max_megapixels << 20,
        requests_per_minute=args.requests_per_minute,
        max_requests=args.max_requests,
        max_requests_of_client=args.max_requests_of_client,
        timeout_s=args.timeout,
        batch_size=args.batch_size,
        wait_s=args.wait_ms / 1000,
    )
    from capjax.commands import runtime

    with _listen(args.host, args.port) as listener:
        runtime.start(args)
        _serve(args, limits, listener)


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UserError(f"--port={port}: expected 0 (a free one) to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: cannot listen there ({error})") from error
    # Connections inherit it. asyncio sets it only where the socket names its protocol; without it
    # an answer's body waits 40 ms for the client to acknowledge the header.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _serve(args: argparse.Namespace, limits, listener: socket.socket) -> None:
    import uvicorn

    from capjax.decoding.load import load
    from capjax.serving.app import make_app

    # Anyone can send what these loggers speak of.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    begin = time.monotonic()
    captioner = load(args.checkpoint, args.step)
    if not captioner.has_null_image:
        print(
            "capjax: warning: trained without image_dropout: guidance will be weak", file=sys.stderr
        )

    def stop() -> None:
        server.should_exit = True

    app, batcher = make_app(captioner, limits, on_ready=_announce_ready(begin), on_failure=stop)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="on",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=args.trusted_proxy is not None,
            forwarded_allow_ips=args.trusted_proxy,
            timeout_graceful_shutdown=int(args.timeout) + 1,
        )
    )
    host, port = listener.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}/ (compiling)", flush=True)
    # uvicorn raises the signal that stopped it again when all is done; a stop asked for is success.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    server.run(sockets=[listener])
    if batcher.failure is not None:
        raise batcher.failure
    print("stopped; every request that was accepted is answered")


def _announce_ready(begin: float):
    def announce() -> None:
        print(f"ready after {time.monotonic() - begin:.1f} s", flush=True)

    return announce
