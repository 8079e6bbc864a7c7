"""`capjax data stats`: sources in numbers, and what they share."""

import argparse
import itertools
import sys
import time

from capjax.commands import data_flags

_LINE_EVERY_S = 10.0


def add_command(commands) -> None:
    """Adds `stats` and its flags to the sub-commands of `capjax data`."""
    parser = commands.add_parser(
        "stats",
        help="count captions, images, duplicates, and what several sources share",
        allow_abbrev=False,
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="one or more sources")
    parser.add_argument("--output", metavar="FILE.html", help="write a page with charts there")
    parser.add_argument("--tokenizer", metavar="FILE", help="count tokens by it")
    parser.add_argument(
        "--text_length", type=int, default=64, metavar="N", help="tokens kept (default 64)"
    )
    data_flags.add_reading(parser, "look at so many of each source")


def run(args: argparse.Namespace) -> None:
    """Prints the numbers. Raises `UserError` for input that is wrong."""
    data_flags.check_counts(args, "text_length", "max_examples")
    output = data_flags.output_file(args)
    from capjax.data.sources import open_source
    from capjax.data.stats import measure, shared
    from capjax.data.stats_page import html_page, text_report, warnings
    from capjax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(args.tokenizer) if args.tokenizer else None
    opened = [open_source(name) for name in args.sources]
    measured = []
    for source, name in zip(opened, args.sources, strict=True):
        stats = measure(
            source,
            name,
            tokenizer=tokenizer,
            text_length=args.text_length,
            lower=args.lower,
            max_examples=args.max_examples,
            report=_reporter(name),
        )
        print(text_report(stats))
        measured.append(stats)
    leaks = [
        shared(measured[i], measured[j], opened[j])
        for i, j in itertools.combinations(range(len(measured)), 2)
    ]
    for line in warnings(leaks):
        print(line)
    if output is not None:
        output.write_text(html_page(measured, leaks), "utf-8")
        print(f"page: {output.resolve()}")


def _reporter(name: str):
    """Says on stderr, now and then, how far it is."""
    printed_at = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal printed_at
        if time.monotonic() - printed_at >= _LINE_EVERY_S:
            printed_at = time.monotonic()
            print(f"{name}: {done}/{total}", file=sys.stderr, flush=True)

    return report
