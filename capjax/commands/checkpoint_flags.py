"""The flag that names one of a run's checkpoints."""

import argparse


def add_step(parser: argparse.ArgumentParser) -> None:
    """`--step`: a number, or "best"."""
    parser.add_argument(
        "--step",
        type=_step,
        metavar="N|best",
        help="checkpoint (default: the newest); best: by the run's checkpoint.best_metric",
    )


def _step(text: str) -> int | str:
    if text == "best":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, or best") from None
