"""`capjax plan`: what a config's training step would take of chips that are not here."""

import argparse
import json
from pathlib import Path

from capjax.errors import UserError
from capjax.planning.fit import MAX_COMPILES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `capjax plan`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME|FILE[:ARG]",
        help="a shipped config or a Python file; --config.a.b=v overrides a field",
    )
    parser.add_argument(
        "--topology",
        required=True,
        help="chips and how they are joined: v5e:8x8, v5p:4x4x8, two slices as '2*v5e:8x8'; "
        "GPUs as h100:64, whose memory is estimated, not compiled",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help=f"look for the largest batch that fits (<= {MAX_COMPILES} compiles)",
    )
    parser.add_argument("--shardings", action="store_true", help="print where every array lies")
    parser.add_argument("--output", metavar="FILE.json", help="write all figures there, by name")


def run(args: argparse.Namespace) -> int:
    """Prints the plan; returns 0 where the step fits and 1 where not. Raises `UserError`."""
    from capjax.commands import settings
    from capjax.planning.topology import parse_topology, planned_devices, prepare

    topology = parse_topology(args.topology)
    config = settings.load_config(args.config, args.overrides)
    settings.check_supervised(config, args.config)
    output = Path(args.output).expanduser() if args.output else None
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--output={output}: expected a file in an existing directory")
    prepare(topology)

    from capjax.commands.program import build_mesh, check_counts
    from capjax.planning import sharding, table
    from capjax.training.progress import Progress

    mesh = build_mesh(config, planned_devices(topology))
    check_counts(config, mesh)
    with Progress(is_shown=True) as progress:
        plan = search if args.search else measure
        facts = plan(config, topology, mesh, progress.doing)
    if args.shardings:
        state, _ = build(config, mesh).abstract_inputs()
        print(sharding.render(sharding.sharding_table(state, mesh)), end="\n\n")
    if output is not None:
        output.write_text(json.dumps(facts, indent=2) + "\n")
    print(table.render(facts))
    return 0 if facts["memory"]["fits"] else 1


def build(config, mesh):
    """The program of a config. Opens its source only to count epochs, if it has any."""
    from capjax.commands.program import build_program
    from capjax.data.tokenizer import EOS_ID, Tokenizer

    settings = config.data.tokenizer
    vocab_size, eos_id, num_examples = settings.vocab_size, EOS_ID, None
    if settings.path:
        tokenizer = Tokenizer.from_file(settings.path)
        vocab_size, eos_id = tokenizer.vocab_size, tokenizer.eos_id
    optimizer = config.optimizer
    epochs = (config.total_epochs, optimizer.warmup_epochs, optimizer.cooldown_epochs)
    if any(value is not None for value in epochs):
        from capjax.commands.build import build_source

        num_examples = len(build_source(config) or ())
    return build_program(
        config, mesh, vocab_size=vocab_size, eos_id=eos_id, num_examples=num_examples
    )


def measure(config, topology, mesh, doing) -> dict:
    """The facts of the config's step."""
    import jax

    from capjax.mesh import num_batch_shards
    from capjax.planning.facts import Run, step_facts

    program = build(config, mesh)
    together = program.objectives.rows_together(config.captions.per_image)
    run = Run(
        name=config.name,
        num_params=program.towers.num_params(),
        batch_size=config.batch_size,
        accumulation_steps=config.accumulation_steps,
        total_steps=program.total_steps,
        remat=config.model.remat,
        flops_per_image=program.towers.flops_per_example(),
        microbatch_unit=num_batch_shards(mesh) * together,
    )
    state, batch = program.abstract_inputs()
    with jax.set_mesh(mesh):
        traced = program.train_step.trace(state, batch)
    return step_facts(run, traced, state, batch, topology=topology, mesh=mesh, doing=doing)


def search(config, topology, mesh, doing) -> dict:
    """The facts of the largest batch found to fit, or of the least one tried if none was.

    With every try; `largest_batch`, 0 if none fitted, which is a lower bound: larger ones may fit
    up to `too_large_batch`, the least that did not (None: all did); and both in words.
    """
    from capjax.mesh import num_batch_shards
    from capjax.planning.estimate import argument_memory
    from capjax.planning.fit import largest_batch

    found: dict[int, dict] = {}

    def bytes_needed(batch_size: int) -> int:
        with config.unlocked():
            config.batch_size = batch_size
        found[batch_size] = measure(config, topology, mesh, doing)
        return found[batch_size]["memory"]["needed"]

    program = build(config, mesh)
    together = program.objectives.rows_together(config.captions.per_image)
    empty = argument_memory(*program.abstract_inputs())
    best = largest_batch(
        bytes_needed,
        available=topology.device_memory(mesh.size),
        unit=num_batch_shards(mesh) * together * config.accumulation_steps,
        first=config.batch_size,
        fixed=empty.state + empty.parameters,
        growth=8 if topology.is_tpu else 1024,  # a far too large batch takes long to compile
    )
    return found[best.fits or min(found)] | {
        "tries": [one._asdict() for one in best.tries],
        "largest_batch": best.fits,
        "too_large_batch": best.fails,
        "largest_batch_in_words": best.in_words(),
    }
