"""`capjax data`: looks at a source, prepares it, or trains a tokenizer on its captions."""

import argparse
from pathlib import Path

from capjax.commands import data_bags, data_boost, data_flags, data_prepare, data_stats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands and their flags."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    data_prepare.add_command(commands)
    data_stats.add_command(commands)
    data_bags.add_command(commands)
    data_boost.add_command(commands)
    inspect = commands.add_parser(
        "inspect",
        help="print training pairs and token lengths, and draw a contact sheet",
        allow_abbrev=False,
    )
    _add_captions(inspect)
    inspect.add_argument("--num", type=int, default=16, metavar="N", help="pairs (default 16)")
    inspect.add_argument("--seed", type=int, default=0, help="of the training stream (default 0)")
    inspect.add_argument("--output", metavar="FILE.html", help="write the contact sheet there")
    inspect.add_argument("--tokenizer", metavar="FILE", help="default: one trained on the source")
    sheet = inspect.add_argument_group("transforms of training, as in a config")
    sheet.add_argument("--image_size", type=int, default=64, metavar="PIXELS", help="default 64")
    sheet.add_argument(
        "--crop_scale", type=float, default=1.0, metavar="S", help="least area kept (default 1)"
    )
    sheet.add_argument("--shift_pixels", type=int, default=0, metavar="PIXELS", help="default 0")
    sheet.add_argument("--color_jitter", type=float, default=0.0, metavar="S", help="default 0")
    sheet.add_argument("--flip", action="store_true", help="mirror where no side is named")
    tokenizer = commands.add_parser(
        "tokenizer", help="train a SentencePiece model", allow_abbrev=False
    )
    _add_captions(tokenizer)
    tokenizer.add_argument("--output", required=True, metavar="FILE.model")
    tokenizer.add_argument(
        "--split_by_whitespace",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="no piece spans words (default: yes; no suits captions made of set phrases)",
    )
    for command in (inspect, tokenizer):
        command.add_argument(
            "--vocab_size", type=int, default=1000, metavar="N", help="pieces (default 1000)"
        )


def _add_captions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="a split such as emoji:val, images, ArrayRecord shards"
    )
    parser.add_argument(
        "--caption_sources", metavar="A,B", help="use these captions only, e.g. tts,keyword"
    )
    data_flags.add_reading(parser, "read the captions of so many")


def run(args: argparse.Namespace) -> None:
    """Runs the sub-command. Raises `UserError` for input that is wrong."""
    if args.data_command == "prepare":
        data_prepare.run(args)
        return
    if args.data_command == "stats":
        data_stats.run(args)
        return
    if args.data_command == "bags":
        data_bags.run(args)
        return
    if args.data_command == "boost":
        data_boost.run(args)
        return
    data_flags.check_counts(args, "num", "max_examples")
    output = data_flags.output_file(args)
    from capjax.data.captions import CaptionChoice
    from capjax.data.sources import open_source

    sources = [name for name in (args.caption_sources or "").split(",") if name]
    choice = CaptionChoice(dict.fromkeys(sources, 1.0), args.lower)
    source = open_source(args.source)
    if args.data_command == "inspect":
        _inspect(args, source, choice, output)
    elif output is not None:
        _train_tokenizer(args, source, choice, output)


def _inspect(args: argparse.Namespace, source, choice, output: Path | None) -> None:
    from capjax.data import inspection
    from capjax.data.augmentation import Augment
    from capjax.data.images import ImagePreprocessing
    from capjax.data.tokenizer import Tokenizer

    preprocessing = ImagePreprocessing(args.image_size)
    augment = Augment(
        crop_scale=(args.crop_scale, 1.0),
        shift_pixels=args.shift_pixels,
        flip=args.flip,
        color_jitter=args.color_jitter,
    )
    texts = inspection.source_texts(source, choice, args.max_examples)
    if args.tokenizer:
        tokenizer = Tokenizer.from_file(args.tokenizer)
    else:
        tokenizer = Tokenizer.train(texts, args.vocab_size)
    pairs = inspection.first_pairs(
        source,
        tokenizer,
        args.num,
        preprocessing=preprocessing,
        augment=augment,
        choice=choice,
        seed=args.seed,
    )
    lengths = inspection.length_table(tokenizer.count(text) for text in texts)
    print(f"{args.source}: {len(source)} examples, {len(texts)} captions\n")
    print(inspection.pair_table(pairs), f"\n{lengths}", sep="\n")
    if output is not None:
        title = f"{args.source}: {len(source)} examples"
        about = f"seed {args.seed}, {preprocessing}, {augment}, {tokenizer}"
        output.write_text(inspection.contact_sheet(pairs, title, about, lengths), "utf-8")
        print(f"\ncontact sheet: {output.resolve()}")


def _train_tokenizer(args: argparse.Namespace, source, choice, output: Path) -> None:
    from capjax.data import inspection
    from capjax.data.tokenizer import Tokenizer

    texts = inspection.source_texts(source, choice, args.max_examples)
    tokenizer = Tokenizer.train(
        texts, args.vocab_size, split_by_whitespace=args.split_by_whitespace
    )
    output.write_bytes(tokenizer.model_bytes)
    fewer = " (the captions hold no more)" if tokenizer.vocab_size < args.vocab_size else ""
    print(inspection.length_table(tokenizer.count(text) for text in texts))
    print(f"{tokenizer.vocab_size} pieces{fewer}, sha256 {tokenizer.fingerprint}: {output}")
