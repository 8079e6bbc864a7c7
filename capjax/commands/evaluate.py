"""`capjax evaluate`: measures a run's checkpoint on its splits or any other source, or captions."""

import argparse

from capjax.commands import checkpoint_flags
from capjax.errors import UserError

TOKENIZERS = ("auto", "ptb", "treebank", "none")  # as in evaluation/tokenization.py
GOES_WITH = {
    "workdir": (
        *("step", "split", "batch_size", "max_examples"),
        *("probes", "probe_source", "probe_examples", "labels", "composition"),
        *("judge", "judge_prompt", "guidance_scales", "lexicon", "attention"),
    ),
    "captions": ("references", "output"),
    "compare": ("references", "csv", "latex"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `capjax evaluate`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", help="directory of the run")
    what.add_argument(
        "--captions",
        metavar="FILE",
        help="measure these captions (JSON lines of key, caption or captions, references) without "
        "a model",
    )
    what.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two workdirs, or two files of captions: figures, intervals and paired tests",
    )
    checkpoint_flags.add_step(parser)
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="what to evaluate, such as style=emoji:style or mine=photos/; may be repeated "
        "(default: the splits of the run's config)",
    )
    parser.add_argument("--batch_size", type=int, metavar="N", help="default: the config's")
    parser.add_argument(
        "--max_examples", type=int, metavar="N", help="of each split, evenly spread (default: all)"
    )
    _add_measures(
        parser.add_argument_group("more of a run (defaults: the config's section `evaluate`)")
    )
    parser.add_argument(
        "--references",
        metavar="FILE",
        help="with --captions or --compare: JSON lines of key and references, or COCO's "
        "annotations (default: the references in the captions' own file)",
    )
    parser.add_argument(
        "--tokenizer",
        choices=TOKENIZERS,
        default="auto",
        help="of captions: ptb (the reference, needs Java), treebank (its rules without Java), "
        "none (split at spaces), auto (ptb where it runs; the default)",
    )
    parser.add_argument("--output", metavar="FILE", help="with --captions: write the result there")
    parser.add_argument("--csv", metavar="FILE", help="with --compare: write the table there")
    parser.add_argument("--latex", metavar="FILE", help="with --compare: write the table there")


def _add_measures(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--probes",
        action="store_const",
        const=True,
        help="k-NN, linear probe, few-shot on frozen features; zero-shot by towers or likelihood",
    )
    group.add_argument(
        "--probe_source", metavar="SOURCE", help="what they learn from (the training data)"
    )
    group.add_argument(
        "--probe_examples", type=int, metavar="N", help="at most so many of it (50,000)"
    )
    group.add_argument("--labels", metavar="FILE", help="the names of the classes, one a line")
    group.add_argument(
        "--composition",
        action="append",
        metavar="NAME[=FILE[;IMAGES]]",
        help="a test of composition: emoji (built from the embedded corpus), winoground, "
        "sugarcrepe, ...; may be repeated",
    )
    group.add_argument(
        "--judge", metavar="DIR", help="a run or checkpoint of towers that scores the captions"
    )
    group.add_argument(
        "--judge_prompt",
        metavar="TEXT",
        help="what texts begin with for its scores ('A photo depicts '; may be empty)",
    )
    group.add_argument(
        "--guidance_scales",
        type=_scales,
        metavar="X[,X...]",
        help="caption with these too (1.5,2), for trade-offs",
    )
    group.add_argument(
        "--lexicon",
        metavar="FILE",
        help="what captions mention that no reference does, of the things in this file (or emoji)",
    )
    group.add_argument(
        "--attention",
        type=int,
        default=0,
        metavar="N",
        help="keep where the captioner looks for each word of N captions of each split",
    )


def _scales(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers with commas between, got {text!r}"
        ) from None


def run(args: argparse.Namespace) -> None:
    """Prints what was measured; of a run, writes metrics, captions and evaluations too."""
    _check(args)
    from capjax.commands import compare, evaluate_captions, evaluate_run

    if args.compare:
        compare.run(args)
    elif args.captions:
        evaluate_captions.run(args)
    else:
        evaluate_run.run(args)


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for a flag that goes with something else than was asked for."""
    asked = next(name for name in GOES_WITH if getattr(args, name) is not None)
    if not all(getattr(args, asked)):
        raise UserError(f"--{asked} is empty; name what to evaluate")
    for flag in (flag for flags in GOES_WITH.values() for flag in flags):
        if getattr(args, flag) and flag not in GOES_WITH[asked]:
            places = [f"--{name}" for name, flags in GOES_WITH.items() if flag in flags]
            raise UserError(f"--{flag} goes with {' or '.join(places)}, not with --{asked}")
