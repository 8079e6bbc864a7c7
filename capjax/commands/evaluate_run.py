"""`capjax evaluate --workdir`: a run's checkpoint on its splits, or on any other source."""

import argparse
import contextlib

from capjax.errors import UserError


def run(args: argparse.Namespace) -> None:
    """Prints the numbers, adds them to metrics.jsonl, writes captions/ and evaluations/.

    Raises `UserError` where the workdir cannot be written: at once, or, where a disk fills up, once
    all is measured and printed.
    """
    from capjax.commands import runtime

    splits = _splits(args.split)
    runtime.start(args, alike={})

    import jax
    from etils import epath
    from ml_collections import ConfigDict

    from capjax.commands import build
    from capjax.commands.attention import write_attention
    from capjax.commands.evaluators import Evaluation
    from capjax.commands.measures import MEASURES
    from capjax.commands.models import build_objectives
    from capjax.commands.program import build_mesh
    from capjax.data.sources import open_source
    from capjax.decoding.load import load
    from capjax.mesh import check_batch_size
    from capjax.training.stopping import end_cleanly
    from capjax.training.storage import warn

    root = epath.Path(args.workdir).expanduser()
    loaded = load(root, args.step)
    config = ConfigDict(loaded.config) if "evaluate" in loaded.config else _config_of(loaded)
    splits = splits or dict(config.evaluate.splits)
    if not splits:
        raise UserError(f"{root} has no splits to evaluate; give --split=NAME=SOURCE")
    if not (loaded.towers.generator or loaded.towers.embedder):
        raise UserError(f"{root} holds an image encoder alone; expected captions or embeddings")
    loaded.tokenizer  # noqa: B018 (raises where it has none)
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
        features=root / "features",
    )
    model = loaded.on_mesh(mesh)
    found: dict[str, dict[str, float]] = {}
    with end_cleanly(), contextlib.ExitStack() as stack:
        # What was measured is said and kept, whatever becomes of the rest.
        stack.callback(lambda: any(found.values()) and _say(_table(found, loaded.step)))
        keep = _keeper(root, loaded.step, stack, evaluation.unwritten)
        for name, split in opened.items():
            found[name] = keep(name, evaluation.split(name, split, model))
        for name, _ in evaluation.measures.tests:
            found[f"test_{name}"] = keep(f"test_{name}", evaluation.test(name, model))
        if evaluation.unwritten:
            raise UserError(
                f"{root}: not written: {', '.join(dict.fromkeys(evaluation.unwritten))}; free some "
                "space or make it writable, and evaluate again"
            )
        if args.attention and loaded.towers.generator and jax.process_index() == 0:
            for name in opened:
                write_attention(loaded, root, name, max_images=args.attention)


def _say(text: str) -> None:
    import jax

    if jax.process_index() == 0:
        print(text)


def _keeper(root, step: int, stack: contextlib.ExitStack, unwritten: list[str]):
    """`keep(name, metrics)` adds a line to metrics.jsonl, on one process, and returns them.

    Where it cannot be added any more, that is put into `unwritten`. Raises `UserError` where the
    file cannot be opened.
    """
    import jax

    from capjax.training.metrics import JsonlWriter

    if jax.process_index():
        return lambda name, metrics: metrics
    path = root / "metrics.jsonl"
    try:
        writer = JsonlWriter(
            path,
            restored_step=2**62,  # trims torn lines only
            report=lambda line: unwritten.append("metrics.jsonl"),
        )
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; make it writable") from error

    def closed() -> None:
        with contextlib.suppress(OSError):  # `unwritten` tells of it
            writer.close()

    stack.callback(closed)

    def keep(name: str, metrics: dict[str, float]) -> dict[str, float]:
        writer.write(step, {f"eval/{name}/{metric}": value for metric, value in metrics.items()})
        return metrics

    return keep


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
