"""`capjax data prepare`: any source to checked, deduplicated ArrayRecord shards."""

import argparse
import os
import sys
import time

_LINE_EVERY_S = 10.0


def add_command(commands) -> None:
    """Adds `prepare` and its flags to the sub-commands of `capjax data`."""
    parser = commands.add_parser(
        "prepare",
        help="write a source as shards for training: checked, shrunk, without duplicates",
        description="Writes DIR/NAME-00000-of-00012.array_record, ..., manifest.json and "
        "dropped.jsonl. The same command goes on after an interruption of any kind.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of images, a table, archives, shards, emoji:val, ... (docs/your-data.md)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument("--split", default="train", metavar="NAME", help="default train")
    parser.add_argument(
        "--shard_size", type=int, default=10_000, metavar="N", help="examples (default 10000)"
    )
    images = parser.add_argument_group("images")
    size = images.add_mutually_exclusive_group()
    size.add_argument(
        "--resize", type=int, default=0, metavar="PIXELS", help="shrink until the shorter side is"
    )
    size.add_argument(
        "--max_pixels", type=int, default=0, metavar="N", help="shrink until width x height is"
    )
    images.add_argument(
        "--format",
        choices=("keep", "jpeg", "webp"),
        default="keep",
        help="what images become; those that fit already stay byte for byte (default keep)",
    )
    images.add_argument(
        "--quality", type=int, default=90, metavar="Q", help="of JPEG and WebP (default 90)"
    )
    images.add_argument(
        "--min_size", type=int, default=1, metavar="PIXELS", help="drop if a side is shorter"
    )
    parser.add_argument(
        "--max_caption_length",
        type=int,
        default=0,
        metavar="CHARACTERS",
        help="leave longer captions out (default: none)",
    )
    parser.add_argument(
        "--dedupe",
        default="key",
        metavar="key,content",
        help="drop what has the key, or the image's bytes, of an earlier one; none (default key)",
    )
    parser.add_argument(
        "--max_bad",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="stop if more examples are unreadable (default 0.01)",
    )
    parser.add_argument(
        "--num_workers", type=int, metavar="N", help="processes (default: one a core)"
    )


def run(args: argparse.Namespace) -> None:
    """Prepares the source. Raises `UserError` for input that is wrong."""
    from capjax.data.prepare import prepare, reasons
    from capjax.data.prepare_example import PrepareSettings
    from capjax.data.sources import open_source

    settings = PrepareSettings(
        split=args.split,
        shard_size=args.shard_size,
        resize=args.resize,
        max_pixels=args.max_pixels,
        format=args.format,
        quality=args.quality,
        min_size=args.min_size,
        max_caption_length=args.max_caption_length,
        dedupe=() if args.dedupe == "none" else tuple(args.dedupe.split(",")),
    )
    with Line() as line:
        manifest, was_finished = prepare(
            open_source(args.source),
            args.source,
            args.output,
            settings,
            num_workers=len(os.sched_getaffinity(0))
            if args.num_workers is None
            else args.num_workers,
            max_bad=args.max_bad,
            report=line.show,
        )
    counts, shards = manifest["examples"], manifest["shards"]
    dropped = {reason: drop["count"] for reason, drop in manifest["dropped"].items()}
    megabytes = sum(shard["bytes"] for shard in shards) / 1e6
    if was_finished:
        print(f"finished before: {args.output} holds this source with these settings")
    print(f"{counts['out']} of {counts['in']} examples, {len(shards)} shards, {megabytes:.1f} MB")
    if manifest["captions_dropped"]:
        print(f"captions left out (empty or too long): {manifest['captions_dropped']}")
    if dropped:
        print(f"dropped: {reasons(dropped)} (see {args.output}/dropped.jsonl)")


class Line:
    """The progress on stderr: one line kept up to date on a terminal, else one now and then."""

    def __init__(self) -> None:
        self.is_terminal = sys.stderr.isatty()
        self.printed_at = float("-inf")
        self.stage, self.began, self.first, self.width = "", 0.0, 0, 0

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_) -> None:
        if self.is_terminal and self.width:
            print(file=sys.stderr)

    def show(self, report) -> None:
        """Shows how far it is, how fast, how long it still takes, and what was dropped."""
        now = time.monotonic()
        if report.stage != self.stage:
            self.stage, self.began, self.first = report.stage, now, report.done
            self.printed_at = float("-inf")
        is_last = report.done == report.total
        if now - self.printed_at < (0.2 if self.is_terminal else _LINE_EVERY_S) and not is_last:
            return
        self.printed_at = now
        text = f"{report.stage} {report.done}/{report.total}"
        made, seconds = report.done - self.first, now - self.began
        if made and seconds:
            left = (report.total - report.done) * seconds / made
            text += f"  {made / seconds:.0f}/s  {left // 60:.0f}:{left % 60:02.0f} left"
        if report.dropped:
            text += "  dropped: " + ", ".join(f"{k} {n}" for k, n in sorted(report.dropped.items()))
        if self.is_terminal:
            print(f"\r{text:<{self.width}}", end="", file=sys.stderr, flush=True)
            self.width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)
