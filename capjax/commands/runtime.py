"""JAX as the commands want it: which devices, compiled programs kept on disk, no noise.

`cli` adds these arguments to every command that computes; such a command calls `start(args)`
before it touches an array.
"""

import argparse
import contextlib
import gc
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from capjax.commands import distributed
from capjax.data.files import user_cache
from capjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `start` reads."""
    group = parser.add_argument_group("devices")
    group.add_argument("--platform", choices=("cpu", "gpu", "tpu"), help="default: the best there")
    group.add_argument(
        "--num_cpu_devices", type=int, metavar="N", help="split the CPU into N virtual devices"
    )
    group.add_argument(
        "--compile_cache",
        metavar="DIR|none",
        help="where compiled programs are kept (default: the user's cache directory)",
    )
    distributed.add_arguments(parser)


def start(args: argparse.Namespace, alike: Mapping[str, Any] | None = None) -> None:
    """Sets JAX up. Raises `UserError` where the devices or the cache asked for cannot be had.

    `alike` is given by commands that several processes run as one: what must be the same in all of
    them besides the flags, such as a config's fields. Those find out whether they are several.
    """
    if args.num_cpu_devices is not None and args.num_cpu_devices < 1:
        raise UserError(f"--num_cpu_devices={args.num_cpu_devices}: expected at least 1")
    place = distributed.find_place(args, together=alike is not None)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # C++ warnings that a user cannot act on
    import jax
    from absl import flags, logging

    flags.FLAGS.mark_as_parsed()  # Grain's workers and Orbax read absl flags, which no app parses
    logging.set_verbosity(logging.WARNING)
    if args.platform is not None:
        jax.config.update("jax_platforms", args.platform.replace("gpu", "cuda"))
    if args.num_cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", args.num_cpu_devices)
        # Two programs in flight can take each other's threads and wait in a collective for ever.
        jax.config.update("jax_cpu_enable_async_dispatch", args.num_cpu_devices == 1)
    directory = compile_cache(args.compile_cache)
    if directory is not None:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if place is not None:
        distributed.connect(place, args, alike or {})
    try:
        jax.devices()
    except RuntimeError as error:
        asked = args.platform or os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"--platform={asked}: JAX finds no such device here; try --platform=cpu, "
            f"or install capjax[cuda] or capjax[tpu] ({str(error).splitlines()[0]})"
        ) from error
    if place is not None:
        distributed.check_devices()


def compile_cache(asked: str | None) -> Path | None:
    """The directory of compiled programs: the flag, else JAX's variable, else the user's cache.

    None where it is switched off, or where the user's cache cannot be written. Raises `UserError`
    where a directory was asked for by name and cannot be written.
    """
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR", "") if asked is None else asked
    if named == "none":
        return None
    directory = Path(named) if named else user_cache() / "capjax" / "jax"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        if named:
            raise UserError(
                f"--compile_cache={named}: cannot write there ({error.strerror}); "
                "name another directory, or none"
            ) from error
        return None
    return directory


@contextlib.contextmanager
def rarer_collections() -> Iterator[None]:
    """Within it Python seldom looks for garbage: imports and traces make a million objects to keep.

    That takes a sixth off the seconds of either.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
