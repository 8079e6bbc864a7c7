"""`capjax evaluate`: measures a run's checkpoint on its splits, or on any other source."""

import argparse

from capjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `capjax evaluate`."""
    parser.add_argument("--workdir", required=True, help="directory of the run")
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


def run(args: argparse.Namespace) -> None:
    """Prints the metrics, adds them to metrics.jsonl, and writes captions/<split>.jsonl."""
    from capjax.commands import runtime

    splits = _splits(args.split)
    runtime.start(args)

    import jax
    from etils import epath
    from ml_collections import ConfigDict

    from capjax.commands import build
    from capjax.commands.evaluators import evaluate_split
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
    loaded = loaded.on_mesh(mesh)
    found: dict[str, dict[str, float]] = {}
    for name, split in opened.items():
        found[name] = evaluate_split(
            loaded.towers,
            loaded.params,
            mesh=mesh,
            data=build.build_data(config),
            tokenizer=loaded.tokenizer,
            split=split,
            batch_size=batch_size,
            max_examples=args.max_examples,
            step=loaded.step,
            captions_file=root / "captions" / f"{name}.jsonl",
            objectives=build_objectives(config),
        )
    if jax.process_index() == 0:
        writer = JsonlWriter(root / "metrics.jsonl", restored_step=2**62)  # trims torn lines only
        for name, metrics in found.items():
            writer.write(loaded.step, {f"eval/{name}/{metric}": v for metric, v in metrics.items()})
        writer.close()
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
