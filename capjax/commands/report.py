"""`capjax report`: writes the page of one or several runs."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `capjax report`."""
    parser.add_argument(
        "--workdir",
        dest="workdirs",
        metavar="WORKDIR",
        action="append",
        required=True,
        help="directory of the run; give it several times to compare runs",
    )
    parser.add_argument(
        "--output",
        help="file to write (default: report.html in WORKDIR; comparison.html in the first)",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the images shown (default: 0)")
    parser.add_argument(
        "--images",
        type=int,
        default=1000,
        help="images on the page, of all splits together (default: 1000)",
    )


def run(args: argparse.Namespace) -> None:
    """Writes the page and prints where it is."""
    from capjax.reporting.page import write_report

    path = write_report(args.workdirs, args.output, seed=args.seed, max_images=args.images)
    print(f"report: {path.resolve()}")
