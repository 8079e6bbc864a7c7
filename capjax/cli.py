"""`capjax <command>`: finds the command, turns errors into one line, and sets the exit status.

0 success; 1 something failed; 2 the input is wrong; 75 stopped by a signal, and the same command
goes on; 130 interrupted by ^C. Only the command asked for is imported, and JAX only when it runs.
"""

import argparse
import importlib
import os
import re
import sys
import traceback
from pathlib import Path
from typing import NamedTuple, NoReturn

import capjax
from capjax.commands import distributed, runtime
from capjax.errors import RunAgain, UserError, did_you_mean


class Command(NamedTuple):
    """What the help shows of a command, and whether it computes on devices."""

    summary: str
    computes: bool
    examples: tuple[str, ...]


COMMANDS = {
    "train": Command(
        "Pretrain a captioner; the same command again resumes it.",
        True,
        (
            "capjax train --config=emoji_quickstart --workdir=runs/quickstart",
            "capjax train --config=emoji_quickstart --workdir=runs/wide --config.model.width=256",
        ),
    ),
    "reinforce": Command(
        "Let a captioner learn from rewards of its own captions; the same command resumes it.",
        True,
        (
            "capjax reinforce --config=emoji_reinforce --checkpoint=runs/vague "
            "--towers=runs/siglip --workdir=runs/reinforced",
            "capjax reinforce --config=emoji_reinforce:cider --checkpoint=runs/vague "
            "--workdir=runs/cider --config.policy.algorithm=scst",
        ),
    ),
    "caption": Command(
        "Write captions for a folder of images, or for a whole corpus.",
        True,
        (
            "capjax caption --checkpoint=runs/quickstart --input=photos --output=captions.jsonl",
            "capjax caption --checkpoint=runs/web --input='{000..099}.tar' --output=captions "
            "--num_beams=4 --num_captions=4 --format=parquet",
        ),
    ),
    "serve": Command(
        "Serve a checkpoint over HTTP: POST an image, get captions; and a page to try it on.",
        True,
        (
            "capjax serve --checkpoint=runs/quickstart",
            "capjax serve --checkpoint=runs/quickstart --port=9000 --batch_size=16",
        ),
    ),
    "evaluate": Command(
        "Measure a checkpoint, or captions against their references, or compare two of either.",
        True,
        (
            "capjax evaluate --workdir=runs/quickstart",
            "capjax evaluate --captions=captions.jsonl --references=captions_val2014.json",
            "capjax evaluate --compare runs/first runs/second --latex=table.tex",
        ),
    ),
    "plan": Command(
        "Compile the training step for chips that are not here: memory, traffic, bounds.",
        False,
        (
            "capjax plan --config=cappa_l14 --topology=v5e:8x8",
            "capjax plan --config=cappa_g14 --topology=v5p:4x4x8 --search --output=plan.json",
            "capjax plan --config=siglip_b16 --topology='2*v5e:8x8' --config.mesh.replica=2",
            "capjax plan --config=cappa_l14 --topology=h100:64 --shardings",
        ),
    ),
    "config": Command(
        "List the shipped configs, show one, or compare two.",
        False,
        (
            "capjax config list",
            "capjax config show emoji_quickstart --config.batch_size=64",
            "capjax config diff emoji_quickstart my_config.py",
        ),
    ),
    "data": Command(
        "Prepare a data source, count it, look at it, improve its captions, or train a tokenizer.",
        False,
        (
            "capjax data prepare photos --output=prepared --resize=256 --format=jpeg",
            "capjax data stats prepared emoji:val --output=stats.html",
            "capjax data inspect emoji:val --output=page.html",
            "capjax data tokenizer emoji:train --vocab_size=1000 --output=emoji.model",
            "capjax data bags --checkpoint=runs/siglip --input=emoji:train --output=bags",
            "capjax data boost --input=prepared --output=boosted --model=mistral "
            "--endpoint=http://localhost:8080/v1",
        ),
    ),
    "report": Command(
        "Write the page of runs: results, curves, and captions beside their images.",
        False,
        (
            "capjax report --workdir=runs/quickstart",
            "capjax report --workdir=runs/cap --workdir=runs/cappa --output=both.html",
        ),
    ),
    "doctor": Command(
        "Check this machine, or several as one: devices, collectives, storage, signals.",
        True,
        (
            "capjax doctor --workdir=runs",
            "capjax doctor --workdir=runs --num_cpu_devices=4",
        ),
    ),
    "checkpoint": Command(
        "List the checkpoints of a run, or verify every byte of them.",
        True,
        ("capjax checkpoint list runs/quickstart", "capjax checkpoint verify runs/quickstart"),
    ),
    "convert": Command(
        "Convert weights of big_vision, Hugging Face or open_clip, and back.",
        True,
        (
            "capjax convert --input=siglip_b16.npz --output=weights/siglip_b16",
            "capjax convert --input=siglip_b16.npz:img --output=weights/vit_b16 --image_size=384",
            "capjax convert --input=cappa.npz --output=weights/cappa --tokenizer=c4_en.model",
            "capjax convert --input=clip-vit-base-patch32 --output=weights/clip_b32",
            "capjax convert --input=runs/siglip --output=siglip.npz --layout=scan",
            "capjax convert --input=runs/siglip --output=siglip_hf --to=huggingface",
            "capjax convert --input=runs/quickstart --output=vit.npz --model=image_encoder",
        ),
    ),
}
PREFIX = "--config."


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (default: this process's); returns the exit status."""
    status, line = _answer(sys.argv[1:] if argv is None else argv)
    distributed.leave(status, line)
    return status


def _answer(argv: list[str]) -> tuple[int, str]:
    """Runs it. Returns the exit status, and the line that was printed of an error."""
    verbose = "--verbose" in argv
    args = None
    try:
        name, rest = _split_command([arg for arg in argv if arg != "--verbose"])
        if name is None:
            return 0, ""
        module = importlib.import_module(f"capjax.commands.{name}")
        args = parse(name, module, rest)
        status = module.run(args)
        sys.stdout.flush()
        return status or 0, ""
    except UserError as error:
        return _report(str(error), error.status, verbose)
    except RunAgain as stop:
        return _report(str(stop), stop.status, verbose, kind="")
    except KeyboardInterrupt:
        return _report("interrupted", 130, verbose)
    except BrokenPipeError:  # the reader of our output (say, `head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, "its output is closed"
    except Exception as error:
        distributed.wait_for_death()
        _log_traceback(getattr(args, "workdir", None))
        text = str(error).strip()
        line = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
        hint = "" if verbose else " (run with --verbose for the traceback)"
        return _report(line + hint, 1, verbose)


def parse(name: str, module, argv: list[str]) -> argparse.Namespace:
    """The arguments of command `name`. Raises `UserError` where they are wrong.

    `--config.a.b=v` flags go to `args.overrides` as `a.b=v`, for commands that have a config.
    """
    argv, overrides = _take_overrides(argv)
    devices = _Parser(prog=f"capjax {name}", add_help=False, allow_abbrev=False)
    if COMMANDS[name].computes:  # first, as a subcommand's parser would not know them
        runtime.add_arguments(devices)
    found, argv = devices.parse_known_args(argv)
    args = make_parser(name, module).parse_args(argv, found)
    if overrides and not hasattr(args, "config"):
        raise UserError(f"capjax {name} reads no config, but got {PREFIX}{overrides[0]}; remove it")
    args.overrides = overrides
    return args


def make_parser(name: str, module) -> argparse.ArgumentParser:
    """The parser of command `name`: the module's arguments and those that all commands share."""
    command = COMMANDS[name]
    parser = _Parser(
        prog=f"capjax {name}",
        description=command.summary,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in command.examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    if command.computes:
        runtime.add_arguments(parser)
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s, with a suggestion for a misspelt flag."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self._misspelt() or message} (see {self.prog} --help)")

    def parse_known_args(self, args=None, namespace=None):  # pyrefly: ignore[bad-override]
        """As argparse does; keeps what was given, for `error`."""
        self.given = list(args or ())
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):  # pyrefly: ignore[bad-override]
        """Parses everything. Raises `UserError` at the first argument that is unknown."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unexpected argument {unknown[0]}")
        return parsed

    def _misspelt(self) -> str:
        """Names a flag that this parser lacks, as a likelier mistake than what argparse sees."""
        known = self._option_string_actions
        for arg in self.given:
            flag = re.split("[=.]", arg)[0]
            if flag.startswith("--") and flag not in known and (near := did_you_mean(flag, known)):
                return f"unexpected argument {arg}{near}"
        return ""


def _split_command(argv: list[str]) -> tuple[str | None, list[str]]:
    """The command's name and its arguments; None where the line is answered here."""
    if argv and argv[0] in ("-h", "--help"):
        print(_help())
        return None, []
    if argv and argv[0] == "--version":
        print(f"capjax {capjax.__version__}")
        return None, []
    if not argv:
        raise UserError(f"name a command: {', '.join(COMMANDS)} (see capjax --help)")
    if argv[0] not in COMMANDS:
        raise UserError(
            f"unknown command {argv[0]}{did_you_mean(argv[0], COMMANDS)} "
            f"(commands: {', '.join(COMMANDS)})"
        )
    return argv[0], argv[1:]


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: capjax <command> [--help] [--verbose] ...",
            "",
            "Pretraining image captioners at scale in JAX.",
            "",
            "commands:",
            *lines,
            "",
            "examples:",
            f"  {COMMANDS['train'].examples[0]}",
            f"  {COMMANDS['report'].examples[0]}",
            "",
            "exit status: 0 success, 1 failure, 2 wrong input, 75 stopped (run again), 130 by ^C",
        ]
    )


def _take_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Splits `--config.a=1` and `--config.a 1` off, as `a=1`. Returns (the rest, the overrides)."""
    rest, overrides = [], []
    queue = list(argv)
    while queue:
        arg = queue.pop(0)
        if not arg.startswith(PREFIX):
            rest.append(arg)
        elif "=" in arg:
            overrides.append(arg.removeprefix(PREFIX))
        elif queue and not queue[0].startswith("--"):
            overrides.append(f"{arg.removeprefix(PREFIX)}={queue.pop(0)}")
        else:
            raise UserError(f"{arg} has no value; write {arg}=VALUE")
    return rest, overrides


def _report(line: str, status: int, verbose: bool, kind: str = "error: ") -> tuple[int, str]:
    """One line on stderr, under the traceback where the user asked for it."""
    if verbose:
        traceback.print_exc()
    print(f"capjax: {kind}{line}", file=sys.stderr)
    return status, line


def _log_traceback(workdir: str | None) -> None:
    """Keeps the traceback in the run's `error.log`, where there is a run and it can be written."""
    if workdir is not None and Path(workdir).is_dir():
        try:
            with (Path(workdir) / "error.log").open("a") as file:
                traceback.print_exc(file=file)
        except OSError:
            pass  # a full or read-only disk may be the very error that is reported


if __name__ == "__main__":
    sys.exit(main())
