"""`capjax caption`: captions of images, or of a whole corpus, as JSON lines or Parquet."""

import argparse
from pathlib import Path

from capjax.commands import caption_checks as checks
from capjax.commands import checkpoint_flags, decoding_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint, what to caption, where to write, and how to decode."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's workdir (its newest checkpoint), or one checkpoint directory",
    )
    checkpoint_flags.add_step(parser)
    parser.add_argument(
        "--input",
        required=True,
        metavar="PATH|SOURCE",
        help="a directory of images, an image, a list of paths (FILE.txt), a split such as "
        "emoji:style, or any other source, say 'webdataset:shards/{000..099}.tar'",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE.jsonl|DIR",
        help="one record an image, in the order of the input: key, caption, logprob, num_tokens, "
        "finish, guidance_scale, seed, and references where the source has captions; or key and "
        "error for an image that cannot be read. A file is there when it is complete. A directory "
        "gets shards and manifest.json; the same command again goes on where it was stopped",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--batch_size",
        type=int,
        default=32,
        metavar="N",
        help="images that a device captions at once (default 32)",
    )
    work.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    work.add_argument(
        "--shard_size", type=int, default=10000, metavar="N", help="images a shard (default 10000)"
    )
    work.add_argument(
        "--format", choices=("jsonl", "parquet"), default="jsonl", help="of shards (default jsonl)"
    )
    work.add_argument(
        "--dedupe",
        action="store_true",
        help="caption images of the same pixels once a shard; the others get duplicate_of",
    )
    work.add_argument(
        "--price_per_hour", type=float, metavar="X", help="of this machine: shows what all costs"
    )
    filters = parser.add_argument_group(
        "filters (records beyond one are kept, with its name in the field filtered)"
    )
    filters.add_argument(
        "--min_logprob", type=float, metavar="X", help="the least mean log-probability a token"
    )
    filters.add_argument("--min_tokens", type=int, metavar="N", help="the fewest tokens")
    filters.add_argument("--max_tokens", type=int, metavar="N", help="the most tokens")
    decode = parser.add_argument_group("decoding")
    decode.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    decode.add_argument("--prefix", metavar="TEXT", help="what every caption begins with")
    decoding_flags.add_arguments(decode)


def run(args: argparse.Namespace) -> None:
    """Writes the captions. Raises `UserError` for input that is wrong, before any compilation."""
    output = Path(args.output).expanduser()
    is_file = output.suffix == ".jsonl"
    checks.check_numbers(args)
    share = checks.take_share(args)
    checks.check_output(args, output, share, is_file)
    options = decoding_flags.from_arguments(args)
    from capjax.data.sources import open_source  # not at the top: --help stays fast
    from capjax.decoding.corpus import Filters

    filters = Filters(
        min_logprob=args.min_logprob, min_tokens=args.min_tokens, max_tokens=args.max_tokens
    )
    source = open_source(args.input)

    from capjax.commands import runtime

    runtime.start(args)
    from capjax.commands.caption_job import CaptionJob
    from capjax.training.stopping import end_cleanly

    job = CaptionJob(
        args, source, options, filters, all_full=not is_file or args.shard_size < len(source)
    )
    with end_cleanly():
        if is_file:
            job.to_file(output)
        else:
            job.to_directory(output, share)
