"""`capjax caption`: captions of a folder, an image or a dataset split, as JSON lines."""

import argparse
import itertools
import json
import os
import time
from pathlib import Path

from capjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint, what to caption, where to write, and how to decode."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's workdir (its newest checkpoint), or one checkpoint directory",
    )
    parser.add_argument(
        "--input",
        required=True,
        metavar="PATH|SOURCE",
        help="a directory of images, an image, ArrayRecord shards, or a split such as emoji:style",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE.jsonl",
        help="one line an image, in the order of the input: key, caption, logprob, num_tokens, "
        "guidance_scale, seed, and references where the source has captions; or key and error for "
        "an image that cannot be read. Grows as FILE.jsonl.partial and is renamed when complete",
    )
    decode = parser.add_argument_group("decoding")
    decode.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    decode.add_argument("--batch_size", type=int, default=32, metavar="N", help="default 32")
    decode.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): greedy"
    )
    decode.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draws at T > 0 (default 0)"
    )
    decode.add_argument(
        "--max_length", type=int, metavar="N", help="tokens of a caption (default: the model's)"
    )
    decode.add_argument("--limit", type=int, metavar="N", help="only the first N images")


def run(args: argparse.Namespace) -> None:
    """Writes the captions. Raises `UserError` for input that is wrong, before any compilation."""
    output = _checked_output(args.output)
    for name, least in {"batch_size": 1, "limit": 1, "max_length": 1, "seed": 0}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value}: expected at least {least}")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature={args.temperature}: expected 0 (greedy) or more")
    from capjax.data.sources import open_source  # not at the top: --help stays fast

    source = open_source(args.input)

    from capjax.commands import runtime

    runtime.start(args)
    from capjax.decoding.inputs import example_reader, read_ahead
    from capjax.decoding.load import load
    from capjax.decoding.options import DecodingOptions
    from capjax.training.progress import Progress

    mesh = _local_mesh(args.batch_size)
    captioner = load(args.checkpoint, args.step, mesh)
    count = min(len(source), args.limit or len(source))
    if not count:
        raise UserError(f"--input={args.input} has no examples; name a source that has some")
    read = example_reader(source, captioner.pixels)
    records = captioner.stream(
        read_ahead(read, range(count), ahead=2 * args.batch_size),
        DecodingOptions(temperature=args.temperature, max_length=args.max_length),
        seed=args.seed,
        batch_size=args.batch_size,
    )
    num_bad, first_bad = 0, ""
    partial = output.with_name(output.name + ".partial")
    with Progress() as progress, partial.open("w", encoding="utf-8") as file:
        with progress.doing("compiling, first batch"):
            first = next(records)
        begin = time.monotonic()
        for done, record in enumerate(itertools.chain([first], records), 1):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            if "error" in record:
                num_bad += 1
                first_bad = first_bad or f"{record['key']}: {record['error']}"
            if done > args.batch_size and done % args.batch_size == 0:  # they come in batches
                rate = (done - args.batch_size) / (time.monotonic() - begin)
                progress.show(f"{done}/{count} images  {rate:.4g} captions/s")
    partial.replace(output)
    if num_bad == count:
        raise UserError(f"none of the {count} images in {args.input} can be read ({first_bad})")
    bad = f"; {num_bad} cannot be read (first: {first_bad})" if num_bad else ""
    print(f"{count - num_bad} captions in {output}{bad}")


def _checked_output(name: str) -> Path:
    output = Path(name).expanduser()
    if output.is_dir():
        raise UserError(f"--output={name} is a directory; name a file in it, say captions.jsonl")
    if not output.parent.is_dir():
        raise UserError(f"--output={name}: there is no directory {output.parent}; make it first")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output={name}: {output.parent} cannot be written; name another place")
    return output


def _local_mesh(batch_size: int):
    """This process's devices, sharing each batch; None where there is one."""
    import jax

    from capjax.mesh import MeshShape, check_batch_size, make_mesh

    if jax.local_device_count() == 1:
        return None
    mesh = make_mesh(MeshShape(), devices=jax.local_devices())
    check_batch_size(batch_size, mesh, "--batch_size")
    return mesh
