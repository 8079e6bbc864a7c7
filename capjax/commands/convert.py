"""`capjax convert`: weights of big_vision, Hugging Face and open_clip, in and out."""

import argparse
import importlib
import re
import shutil
from pathlib import Path
from typing import Any

from capjax.errors import UserError
from capjax.interop.formats import FORMATS, READ_OPTIONS, detect

MODELS = ("captioner", "two_towers", "coca", "image_encoder")
# One of these is in every directory that is written.
_PARTS = ("00000000", "model.safetensors", "open_clip_model.safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what to read, what to write, and what the files do not tell."""
    parser.add_argument(
        "--input",
        required=True,
        metavar="PATH[:SUBTREE]",
        help="a big_vision .npz, perhaps a part of it (siglip.npz:img); a Hugging Face directory; "
        "an open_clip directory or state dict (.pt, .bin, .safetensors); a run's workdir or "
        "checkpoint",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="an .npz file for big_vision, else a directory; it appears when it is complete",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output that is there already"
    )
    parser.add_argument(
        "--from", dest="source", choices=tuple(FORMATS), help="default: told by the input"
    )
    parser.add_argument(
        "--to",
        dest="target",
        choices=tuple(FORMATS),
        help="default: big_vision for an output that ends in .npz, else capjax",
    )
    options = parser.add_argument_group("options")
    options.add_argument(
        "--layout", choices=("loop", "scan"), help="of a big_vision output (default loop)"
    )
    options.add_argument(
        "--model", choices=MODELS, help="which model of a checkpoint (needed where it has several)"
    )
    options.add_argument(
        "--image_size",
        type=int,
        metavar="N",
        help="pixels: of weights with fixed positions; other positions are interpolated to it",
    )
    options.add_argument(
        "--text_length", type=int, metavar="N", help="tokens: of weights with fixed positions"
    )
    options.add_argument(
        "--activation",
        choices=("gelu", "quick_gelu"),
        help="of an open_clip state dict without its open_clip_config.json (default gelu; OpenAI's "
        "weights have quick_gelu)",
    )
    options.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="to store beside the weights, which have no captions without it: a SentencePiece "
        ".model, or a Hugging Face tokenizer.json",
    )


def run(args: argparse.Namespace) -> None:
    """Converts, compares, and prints what was compared. Raises `UserError` and leaves no output."""
    if args.input.startswith("~"):  # no shell does it behind "="
        args.input = str(Path(args.input).expanduser())
    source = args.source or detect(args.input)
    target = args.target or ("big_vision" if args.output.endswith(".npz") else "capjax")
    _check_options(args, source, target)
    output = _checked_output(args)

    from capjax.commands import runtime

    runtime.start(args)
    from capjax.interop.mapping import model_of

    weights, lines = _read(args, source, target)
    partial = output.with_name(f"{output.name}.partial")
    _delete(partial)
    try:
        lines += _write(partial, weights, target, args.layout)
        _put(partial, output)
    except OSError as error:
        raise UserError(f"--output={output}: {error.strerror or error}") from error
    finally:
        _delete(partial)
    print("\n".join([*(f"note: {note}" for note in weights.notes), *lines]))
    size = f"{model_of(weights.config).num_params() / 1e6:.2f} M parameters"
    print(f"{weights.model}, {size}: {source} -> {target}: {output}")


def _read(args: argparse.Namespace, source: str, target: str) -> tuple[Any, list[str]]:
    """The weights as they are to be written, and what their numbers were compared with."""
    from capjax.interop.mapping import resized

    reader = importlib.import_module(FORMATS[source])
    asked = {name: getattr(args, name) for name in READ_OPTIONS[source]}
    weights = reader.read(args.input, **{k: x for k, x in asked.items() if x is not None})
    lines = []
    if source != "capjax":
        lines += [f"read: {line}" for line in reader.compare(args.input, weights)]
    length = getattr(weights.config, "text_length", None)
    if args.text_length not in (None, length):
        raise UserError(f"--text_length={args.text_length}: the weights are for {length} tokens")
    if args.image_size not in (None, weights.config.image_size):
        lines.append(f"resized: from {weights.config.image_size} to {args.image_size} pixels")
        weights = resized(weights, args.image_size)
    if target in ("huggingface", "open_clip") and not weights.preprocessing.get("antialias", True):
        # Their processors have no other way, and the weights are of use all the same.
        note = (
            f"{target} resizes images with antialiasing, which these weights were not trained with"
        )
        preprocessing = {**weights.preprocessing, "antialias": True}
        weights = weights._replace(preprocessing=preprocessing, notes=(*weights.notes, note))
    if args.tokenizer is not None:
        weights = weights._replace(tokenizer_model=_tokenizer(args.tokenizer, weights.config))
    return weights._replace(notes=(*weights.notes, *_losses(weights, target))), lines


def _losses(weights: Any, target: str) -> list[str]:
    """What the files of a format have no place for."""
    from capjax.data.tokenizer import EOS_ID

    notes = []
    if target == "big_vision":
        theirs = {"antialias": False, "mode": "stretch", "resample": "bilinear"}
        ours = {name: weights.preprocessing.get(name, x) for name, x in theirs.items()}
        if ours != theirs:
            said = ", ".join(f"{name}={x}" for name, x in ours.items())
            notes.append(f"big_vision's files do not say how images are prepared: here {said}")
        if (pad := getattr(weights.config, "text_pad_id", EOS_ID)) != EOS_ID:
            notes.append(f"big_vision's files do not say what pads texts: here token {pad}")
    if target in ("big_vision", "open_clip") and weights.tokenizer_model:
        notes.append(f"left out, as {target}'s files have no place for it: the tokenizer")
    return notes


def _write(path: Path, weights: Any, target: str, layout: str | None) -> list[str]:
    """Writes, reads back, computes: what was compared. Raises `UserError` where it differs."""
    from capjax.interop.compare import round_trip_lines

    writer = importlib.import_module(FORMATS[target])
    writer.write(path, weights, **({} if layout is None else {"layout": layout}))
    sizes = {name: getattr(weights.config, name, None) for name in ("image_size", "text_length")}
    fields = {name: sizes[name] for name in sizes if target == "big_vision" and sizes[name]}
    lines = round_trip_lines(weights, writer.read(path, **fields))
    if target != "capjax":
        lines += [f"written: {line}" for line in writer.compare(path, weights)]
    return lines


def _tokenizer(path: str, config) -> bytes:
    from capjax.data.tokenizer import EOS_ID, Tokenizer

    tokenizer = Tokenizer.from_file(path)
    rows = getattr(config, "vocab_size", tokenizer.vocab_size)
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"--tokenizer={path} has {tokenizer.vocab_size} tokens, the model {rows}: "
            "give the one that it was trained with"
        )
    end = getattr(config, "eos_id", EOS_ID)
    if tokenizer.eos_id != end:
        raise UserError(
            f"--tokenizer={path} ends a text with token {tokenizer.eos_id}, the model with {end}: "
            "give the one that it was trained with"
        )
    return tokenizer.model_bytes


def _check_options(args: argparse.Namespace, source: str, target: str) -> None:
    """Raises `UserError` for options that are wrong, or of another format."""
    for name in ("image_size", "text_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: expected at least 1")
    for name, kind in (("model", "capjax"), ("activation", "open_clip")):
        if getattr(args, name) is not None and source != kind:
            raise UserError(
                f"--{name}={getattr(args, name)} is for {kind} input; this is {source}'s"
            )
    if args.output.endswith(".npz") != (target == "big_vision"):
        raise UserError(f"--output={args.output}: big_vision's files end in .npz, no others do")
    if args.layout is not None and target != "big_vision":
        raise UserError(f"--layout={args.layout} is for big_vision output; this is {target}'s")
    if args.tokenizer is not None and target not in ("capjax", "huggingface"):
        raise UserError(f"--tokenizer={args.tokenizer}: {target}'s files have no place for it")


def _checked_output(args: argparse.Namespace) -> Path:
    """The output's path, which can be written and is not there yet. Raises `UserError`."""
    if re.search(r"://|\.npz:", args.output):
        raise UserError(f"--output={args.output}: expected a local path; copy it from there")
    output = Path(args.output).expanduser()
    if output.exists() and not args.overwrite:
        raise UserError(f"--output={output} exists; give --overwrite to replace it")
    if output.is_dir() and not any((output / name).exists() for name in _PARTS):
        raise UserError(f"--output={output} is a directory that is not ours; name another")
    read = Path(re.sub(r"(\.npz):.*", r"\1", args.input)).resolve()
    if output.exists() and output.resolve() in (read, *read.parents):
        raise UserError(f"--output={output} is the input; name another")
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no directory {output.parent}; make it")
    return output


def _put(partial: Path, output: Path) -> None:
    """Renames; what is in its place already is deleted only then."""
    if not output.is_dir():
        partial.replace(output)
        return
    old = output.with_name(f"{output.name}.replaced")
    output.rename(old)
    partial.rename(output)
    _delete(old)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
