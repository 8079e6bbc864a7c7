"""What `capjax caption` refuses before JAX is imported, and which share of the work it takes."""

import argparse
import importlib.util
import os
from pathlib import Path

from capjax.data.files import is_remote
from capjax.decoding.corpus_share import Share
from capjax.errors import UserError

_LEAST = {
    "batch_size": 1,
    "limit": 1,
    "shard_size": 1,
    "seed": 0,
    "min_tokens": 1,
    "max_tokens": 1,
    "price_per_hour": 0,
}


def check_numbers(args: argparse.Namespace) -> None:
    """Raises `UserError` for numbers out of range; those of decoding have checks of their own."""
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value < float("inf"):
            raise UserError(f"--{name}={value}: expected at least {least}")


def take_share(args: argparse.Namespace) -> Share:
    """Which process of how many this is: by the flags, else by Slurm's step, else the only one.

    The processes need not know of one another: without --coordinator the flags are taken from
    `args`, so that JAX is started for this process alone.
    """
    given = args.process_id, args.num_processes
    if given == (None, None):
        number, total = os.environ.get("SLURM_PROCID"), os.environ.get("SLURM_STEP_NUM_TASKS")
        if number is None or total is None:
            return Share()
        return Share(int(number), int(total))
    if None in given or not 0 <= args.process_id < args.num_processes:
        raise UserError(
            f"--process_id={args.process_id} --num_processes={args.num_processes}: give both, "
            "the id from 0 to the number less 1"
        )
    if args.coordinator is None:
        args.process_id = args.num_processes = None
    return Share(*given)


def check_output(args: argparse.Namespace, output: Path, share: Share, is_file: bool) -> None:
    """Raises `UserError` for a place where nothing can be written, or not in this form."""
    if is_remote(args.output):
        raise UserError(f"--output={args.output}: expected a local path; copy the files from there")
    if args.format == "parquet" and (is_file or importlib.util.find_spec("pyarrow") is None):
        if is_file:
            raise UserError(f"--format=parquet is of shards; --output={args.output} is one file")
        raise UserError("--format=parquet needs pyarrow: pip install 'capjax[parquet]'")
    if not is_file:
        return
    if share.num_processes > 1:
        raise UserError(
            f"--output={args.output} is one file, but {share.num_processes} processes share the "
            "work; name a directory"
        )
    if output.is_dir():
        raise UserError(f"--output={args.output} is a directory; choose another name")
    if not output.parent.is_dir():
        raise UserError(f"--output={args.output}: there is no directory {output.parent}; make it")
    if not os.access(output.parent, os.W_OK):
        raise UserError(
            f"--output={args.output}: {output.parent} cannot be written; name another place"
        )
