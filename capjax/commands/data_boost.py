"""`capjax data boost`: captions blended into one by a language model."""

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capjax.commands.data_prepare import Line
from capjax.errors import UserError

if TYPE_CHECKING:
    from capjax.data.boost_endpoint import Chat


def add_command(commands) -> None:
    """Adds `boost` and its flags to the sub-commands of `capjax data`."""
    parser = commands.add_parser(
        "boost",
        help="have a language model blend each image's captions into one",
        description="Writes shards as `capjax data prepare` does, whose examples have one more "
        "caption, of the source `blend` (and `holistic` with --dense); manifest.json; "
        "rejected.jsonl; and answers.jsonl with every answer. The same command goes on after an "
        "interruption of any kind, and pays for no answer twice (docs/finetuning.md).",
        allow_abbrev=False,
    )
    parser.add_argument("--input", required=True, metavar="SOURCE", help="as for prepare")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty directory")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--endpoint", metavar="URL", help="such as http://localhost:8080/v1")
    model.add_argument(
        "--local", metavar="FILE.gguf", help="a small model to be run here (docs/finetuning.md)"
    )
    parser.add_argument("--model", default="", metavar="NAME", help="its name at the endpoint")
    parser.add_argument(
        "--api_key_env", metavar="VARIABLE", help="environment variable that holds the key"
    )
    parser.add_argument(
        "--dense",
        metavar="FILE.jsonl",
        help="longer captions by key, as `capjax caption` writes them: holistic captions too",
    )
    parser.add_argument(
        "--caption_sources", metavar="A,B", help="blend these captions only (default: all)"
    )
    parser.add_argument("--split", default="train", metavar="NAME", help="default train")
    parser.add_argument(
        "--shard_size", type=int, default=10_000, metavar="N", help="examples (default 10000)"
    )
    asking = parser.add_argument_group("requests")
    asking.add_argument("--prompt", metavar="FILE", help="for blends, with {captions} in it")
    asking.add_argument(
        "--holistic_prompt", metavar="FILE", help="with {caption} and {dense} in it"
    )
    asking.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default 0: the likeliest"
    )
    asking.add_argument(
        "--max_tokens", type=int, default=256, metavar="N", help="of an answer (default 256)"
    )
    asking.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    asking.add_argument(
        "--num_variants", type=int, default=1, metavar="N", help="of each image (default 1)"
    )
    asking.add_argument(
        "--request",
        default="{}",
        metavar="JSON",
        help="further fields of each request; null leaves one out",
    )
    asking.add_argument("--concurrency", type=int, default=8, metavar="N", help="default 8")
    asking.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="default 120"
    )
    asking.add_argument(
        "--max_retries", type=int, default=6, metavar="N", help="of a request (default 6)"
    )
    asking.add_argument(
        "--max_failures",
        type=int,
        default=100,
        metavar="N",
        help="stop if more requests stay without an answer (default 100)",
    )


def run(args: argparse.Namespace) -> None:
    """Boosts the captions. Raises `UserError` for input that is wrong."""
    least = {"concurrency": 1, "timeout": 0.001, "max_retries": 0, "max_failures": 0}
    for name, bound in (least | {"num_variants": 1, "max_tokens": 1, "shard_size": 1}).items():
        if not bound <= getattr(args, name) < float("inf"):
            raise UserError(f"--{name}={getattr(args, name)}: expected at least {bound}")
    from capjax.data.boost import boost
    from capjax.data.boost_endpoint import Endpoint
    from capjax.data.boost_example import BoostSettings
    from capjax.data.files import is_remote
    from capjax.data.prepare import reasons
    from capjax.data.sources import open_source

    if is_remote(args.output):
        raise UserError(f"--output={args.output}: expected a local directory; copy it from there")
    prompts = {"blend_prompt": args.prompt, "holistic_prompt": args.holistic_prompt}
    if bool(args.endpoint) != bool(args.model):
        raise UserError(f"--model={args.model}: expected the model's name with --endpoint only")
    settings = BoostSettings(
        model=args.model or _local_name(args.local),
        **{name: _text(path) for name, path in prompts.items() if path},
        request={"temperature": args.temperature, "max_tokens": args.max_tokens, **_request(args)},
        seed=args.seed,
        num_variants=args.num_variants,
        sources=tuple(name for name in (args.caption_sources or "").split(",") if name),
        split=args.split,
        shard_size=args.shard_size,
    )
    source, dense = open_source(args.input), _dense(args.dense) if args.dense else None
    if args.endpoint:
        limits = {"timeout_s": args.timeout, "max_retries": args.max_retries}
        chat = Endpoint(args.endpoint, _key(args), **limits)
    else:
        chat = _local(args.local)
    with Line() as line:
        found = boost(
            source,
            args.input,
            Path(args.output).expanduser(),
            settings,
            chat,
            dense=dense,
            concurrency=args.concurrency if args.endpoint else 1,
            max_failures=args.max_failures,
            report=line.show,
        )
    manifest = found.manifest
    made = ", ".join(f"{count} {kind}" for kind, count in manifest["captions"].items())
    print(f"{manifest['examples']['out']} examples in {args.output}; new captions: {made}")
    print(
        f"{found.num_asked} requests, {found.num_prompt_tokens} tokens read, "
        f"{found.num_tokens} written"
    )
    if found.num_damaged:
        print(f"damaged lines of {args.output}/answers.jsonl: {found.num_damaged}")
    if manifest["rejected"]:
        print(f"not made: {reasons(manifest['rejected'])} (see {args.output}/rejected.jsonl)")


def _text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); expected a prompt") from error


def _request(args: argparse.Namespace) -> dict[str, Any]:
    try:
        fields = json.loads(args.request)
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or fields.keys() & {"model", "messages", "seed", "stream"}:
        raise UserError(
            f"--request={args.request}: expected an object such as '{{\"top_p\": 0.9}}', without "
            "model, messages, seed or stream"
        )
    return fields


def _key(args: argparse.Namespace) -> str:
    if not args.api_key_env:
        return ""
    if not (key := os.environ.get(args.api_key_env, "").strip()):
        raise UserError(f"--api_key_env={args.api_key_env}: that variable is not set; set it")
    return key


def _local_name(path: str) -> str:
    """The file's name and hash: another file of that name is another model."""
    try:
        with Path(path).expanduser().open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"--local={path}: cannot be read ({error.strerror})") from error
    return f"{Path(path).name} {digest[:16]}"


def _local(path: str) -> "Chat":
    from capjax.decoding.chat import LocalChat
    from capjax.interop.gguf import read_language_model

    return LocalChat(read_language_model(Path(path).expanduser()))


def _dense(path: str) -> dict[str, str]:
    from capjax.evaluation.caption_files import read_captions

    found = read_captions(path)
    return {key: texts[0] for key, texts in zip(found.keys, found.candidates, strict=True)}
