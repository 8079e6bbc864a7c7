"""Flags that the sub-commands of `capjax data` share, and their checks."""

import argparse
from pathlib import Path

from capjax.errors import UserError


def add_reading(parser: argparse.ArgumentParser, max_examples_help: str) -> None:
    """`--lower` and `--max_examples`."""
    parser.add_argument(
        "--lower",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="lower-case the captions, as in training (default: yes)",
    )
    parser.add_argument(
        "--max_examples",
        type=int,
        default=1_000_000,
        metavar="N",
        help=f"{max_examples_help}, evenly spread (default 1000000)",
    )


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raises `UserError` unless each flag that there is holds 1 or more."""
    for name in names:
        if getattr(args, name, 1) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: expected at least 1")


def output_file(args: argparse.Namespace) -> Path | None:
    """The file of `--output`, if given. Raises `UserError` where it cannot be one."""
    output = Path(args.output).expanduser() if args.output else None
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--output={output}: expected a file in an existing directory")
    return output
