"""`capjax data bags`: bags of images much alike, by the embeddings of two towers."""

import argparse
import json
from pathlib import Path
from typing import Any

from capjax.commands import data_flags, runtime
from capjax.errors import UserError

RANDOM = "random"
MADE = "made.json"
SIZES = "2,3,5,7,10,15,20"  # of the published curriculum


def add_command(commands) -> None:
    """Adds `bags` and its flags to the sub-commands of `capjax data`."""
    parser = commands.add_parser(
        "bags",
        help="group images much alike into bags, for training on hard distractors",
        description="Writes DIR/LEVEL/SIZE.json, a list of lists of keys, and DIR/LEVEL/made.json, "
        "by file how it was made.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input", required=True, metavar="SOURCE", help="the images, such as emoji:train"
    )
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="of two towers; --level=random needs none"
    )
    parser.add_argument(
        "--sizes", default=SIZES, metavar="N,N", help=f"images a bag (default {SIZES})"
    )
    parser.add_argument(
        "--level",
        default="hard",
        metavar="NAME",
        help="what these bags are called; bags of the level random are drawn by chance, for "
        "comparison (default hard)",
    )
    parser.add_argument(
        "--features",
        choices=("image", "text", "both"),
        default="both",
        help="what must be alike: the images, their captions, or both equally (default both)",
    )
    parser.add_argument(
        "--max_similarity",
        type=float,
        default=0.98,
        metavar="X",
        help="no two images of a bag have a higher cosine: near-duplicates by default (0.98), and "
        "bags become easier with less",
    )
    parser.add_argument(
        "--min_similarity",
        type=float,
        default=-1.0,
        metavar="X",
        help="all images of a bag have at least this cosine with its first (default: any)",
    )
    parser.add_argument(
        "--caption_sources", metavar="A,B", help="these captions only, e.g. tts,keyword"
    )
    parser.add_argument(
        "--max_examples", type=int, metavar="N", help="so many images, evenly spread (default all)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=128, metavar="N", help="embedded at once (default 128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random bags (default 0)")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print N bags of each size by caption"
    )
    runtime.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the bags. Raises `UserError` for input that is wrong."""
    sizes = _checked(args)
    from capjax.data.bags import build_bags_of_sizes, random_bags, write_bags
    from capjax.data.curriculum import bag_file
    from capjax.data.sources import open_source
    from capjax.training.workdir import write_atomic

    directory = bag_file(args.output, args.level, sizes[0]).parent
    made = _recorded(directory)
    source = open_source(args.input)
    chosen = [name for name in (args.caption_sources or "").split(",") if name]
    runtime.start(args)
    from capjax.commands.bag_features import by_name, cosines, embedded, read_captions

    captions = read_captions(source, args.input, chosen, args.max_examples)
    is_random = args.level == RANDOM
    images = by_name(tuple(captions), captions) if is_random else embedded(args, source, captions)
    if images.features_ND is None:
        bags = {
            size: random_bags(len(captions), size, seed=args.seed, same_N=images.names)
            for size in sizes
        }
    else:
        bags = build_bags_of_sizes(
            images.features_ND,
            sizes,
            duplicate=args.max_similarity,
            min_similarity=args.min_similarity,
            same_N=images.names,
        )
    how = {name: getattr(args, name) for name in _RECORDED} | {"images": len(images.keys)}
    directory.mkdir(parents=True, exist_ok=True)
    for size, found in bags.items():
        if not found:
            print(f"{size:>3} images: no bags; there are {len(images.keys)} images")
            continue
        path = bag_file(args.output, args.level, size)
        write_bags(path, found, images.keys)
        made[path.name] = how | {"bags": len(found)} | cosines(images, found)
        print(_line(len(images.keys), size, made[path.name]))
        for bag in found[:: max(1, len(found) // args.show)][: args.show] if args.show else ():
            print("     " + " | ".join(f"{images.names[row]} ({images.keys[row]})" for row in bag))
    write_atomic(directory / MADE, json.dumps(made, indent=2) + "\n")
    print(f"bags: {directory}")


_RECORDED = (
    *("input", "checkpoint", "level", "features", "max_similarity", "min_similarity"),
    *("caption_sources", "max_examples", "seed"),
)


def _recorded(directory) -> dict[str, Any]:
    """By file of bags how it was made: of those that are in the directory from earlier calls."""
    path = directory / MADE
    try:
        kept = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); remove it, or name another --output"
        ) from error
    return {name: how for name, how in kept.items() if (directory / name).exists()}


def _checked(args: argparse.Namespace) -> list[int]:
    """The sizes. Raises `UserError` for flags that are wrong."""
    sizes = args.sizes.split(",")
    if not all(size.isdecimal() and int(size) > 1 for size in sizes):
        raise UserError(f"--sizes={args.sizes}: expected numbers from 2 on, such as 2,3,5")
    if not args.level or "/" in args.level:
        raise UserError(f"--level={args.level}: expected the name of a directory, such as hard")
    if args.level != RANDOM and not args.checkpoint:
        raise UserError(
            "--checkpoint is missing: name the two towers that say which images are alike "
            f"(only --level={RANDOM} needs none)"
        )
    if args.max_examples is not None:
        data_flags.check_counts(args, "max_examples")
    data_flags.check_counts(args, "batch_size")
    output = Path(args.output).expanduser()
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file: expected a directory, or a new name")
    return sorted({int(size) for size in sizes})


def _line(num_images: int, size: int, made: dict[str, Any]) -> str:
    inside = made["bags"] * size
    line = f"{size:>3} images: {made['bags']} bags with {inside} of {num_images} images"
    cosines = [f"{name} {value:.2f}" for name, value in made.get("cosine", {}).items()]
    return line + (f"; mean cosine: {', '.join(cosines)}" if cosines else "")
