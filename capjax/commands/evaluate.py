"""`capjax evaluate`: measures a run's checkpoint on its splits or any other source, or captions."""

import argparse

from capjax.errors import UserError

TOKENIZERS = ("auto", "ptb", "treebank", "none")  # as in evaluation/tokenization.py
GOES_WITH = {
    "workdir": (
        *("step", "split", "batch_size", "max_examples"),
        *("probes", "probe_source", "labels", "composition", "judge", "guidance_scales"),
        *("lexicon", "attention"),
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
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
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
    if args.compare or args.captions:
        from capjax.commands import compare, evaluate_captions

        (compare if args.compare else evaluate_captions).run(args)
    else:
        _evaluate_run(args)


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for a flag that goes with something else than was asked for."""
    asked = next(name for name in GOES_WITH if getattr(args, name))
    for flag in (flag for flags in GOES_WITH.values() for flag in flags):
        if getattr(args, flag) and flag not in GOES_WITH[asked]:
            places = [f"--{name}" for name, flags in GOES_WITH.items() if flag in flags]
            raise UserError(f"--{flag} goes with {' or '.join(places)}, not with --{asked}")


def _evaluate_run(args: argparse.Namespace) -> None:
    from capjax.commands import runtime

    splits = _splits(args.split)
    runtime.start(args)

    import jax
    from etils import epath
    from ml_collections import ConfigDict

    from capjax.checkpoint.reading import warn
    from capjax.commands import build
    from capjax.commands.attention import write_attention
    from capjax.commands.evaluators import Evaluation
    from capjax.commands.measures import MEASURES
    from capjax.commands.models import build_objectives
    from capjax.commands.program import build_mesh
    from capjax.data.sources import open_source
    from capjax.decoding.load import load
    from capjax.mesh import check_batch_size
    from capjax.training.metrics import JsonlWriter

    root = epath.Path(args.workdir).expanduser()
    loaded = load(root, args.step)
    config = ConfigDict(loaded.config) if "evaluate" in loaded.config else _config_of(loaded)
    splits = splits or dict(config.evaluate.splits)
    if not splits:
        raise UserError(f"{root} has no splits to evaluate; give --split=NAME=SOURCE")
    if not (loaded.towers.generator or loaded.towers.embedder):
        raise UserError(f"{root} holds an image encoder alone; expected captions or embeddings")
    opened = {name: (source, open_source(source)) for name, source in splits.items()}
    batch_size = args.batch_size or config.evaluate.batch_size
    mesh = build_mesh(config)
    check_batch_size(batch_size, mesh, "--batch_size")
    given = {name: getattr(args, name) for name in MEASURES}
    evaluation = Evaluation(
        root,
        mesh,
        build.build_data(config),
        build_objectives(config),
        build.build_measures(config, **given, tokenizer=args.tokenizer, java=None),
        batch_size=batch_size,
        max_examples=args.max_examples,
        say=lambda line: warn(line.removeprefix("warning: ")),
    )
    model = loaded.on_mesh(mesh)
    found = {name: evaluation.split(name, split, model) for name, split in opened.items()}
    for name, _ in evaluation.measures.tests:
        found[f"test_{name}"] = evaluation.test(name, model)
    if jax.process_index() == 0:
        writer = JsonlWriter(root / "metrics.jsonl", restored_step=2**62)  # trims torn lines only
        for name, metrics in found.items():
            writer.write(loaded.step, {f"eval/{name}/{metric}": v for metric, v in metrics.items()})
        writer.close()
        for name in opened if args.attention and loaded.towers.generator else ():
            write_attention(loaded, root, name, max_images=args.attention)
        print(_table(found, loaded.step))


def _config_of(loaded):
    """What a run's config would say, of weights that were converted."""
    import dataclasses

    from capjax.commands.defaults import default_config

    config = default_config()
    config.preprocessing.update(dataclasses.asdict(loaded.preprocessing))
    for model in loaded.towers.models:
        config.data.text_length = getattr(model.config, "text_length", config.data.text_length)
        if getattr(model.config, "logit_bias_init", 0.0) is None:
            config.objective.contrastive.kind = "softmax"
    return config


def _splits(flags: list[str]) -> dict[str, str]:
    splits = dict(flag.split("=", 1) for flag in flags if "=" in flag.strip("="))
    if len(splits) != len(flags):
        raise UserError(
            f"--split={' '.join(flags)}: expected distinct NAME=SOURCE, such as style=emoji:style"
        )
    return splits


def _table(found: dict[str, dict[str, float]], step: int) -> str:
    """The metrics as text: a row for each metric, a column for each split."""
    names = list(dict.fromkeys(name for metrics in found.values() for name in metrics))
    wide = max(len(name) for name in names)
    lines = [f"{f'step {step}':{wide}}  " + "  ".join(f"{split:>12}" for split in found)]
    for name in names:
        cells = [f"{m[name]:12.4f}" if name in m else " " * 12 for m in found.values()]
        lines.append(f"{name:{wide}}  " + "  ".join(cells))
    return "\n".join(lines)
