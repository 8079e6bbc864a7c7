"""`capjax report`: writes the page of a run."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `capjax report`."""
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--output", help="file to write (default: WORKDIR/report.html)")
    parser.add_argument("--seed", type=int, default=0, help="draws the pictures shown (default: 0)")
    parser.add_argument(
        "--tiles", type=int, default=24, help="pictures of each split (default: 24)"
    )


def run(args: argparse.Namespace) -> None:
    """Writes the page and prints where it is."""
    from capjax.reporting.page import write_report

    path = write_report(args.workdir, args.output, seed=args.seed, tiles=args.tiles)
    print(f"report: {Path(path).resolve()}")
