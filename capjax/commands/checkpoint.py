"""`capjax checkpoint`: the checkpoints of a run, and whether every byte of them is as written."""

import argparse

from capjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `list` and `verify`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|verify")
    listing = actions.add_parser("list", help="a line for each checkpoint", allow_abbrev=False)
    verify = actions.add_parser(
        "verify",
        help="read everything again; exit status 1 where something is damaged",
        allow_abbrev=False,
    )
    for action in (listing, verify):
        action.add_argument("path", help="a workdir, its checkpoints/, or one of these")
    verify.add_argument("--step", type=int, metavar="N", help="only this one (default: all)")


def run(args: argparse.Namespace) -> None:
    """Prints to stdout. Raises `UserError` without a checkpoint, `SystemExit(1)` for damage."""
    from capjax.checkpoint import find_steps
    from capjax.commands import runtime

    directory, steps = find_steps(args.path)
    if args.action == "list":
        print(f"{'step':>10}  {'examples seen':>14}  {'size MB':>9}  {'age':>8}  good")
        for step in steps:
            print(_line(directory, step))
        return
    if args.step is not None and args.step not in steps:
        raise UserError(f"--step={args.step}: {directory} has the checkpoints {steps}; name one")
    runtime.start(args)
    damaged = [_verify(directory, s) for s in steps if args.step in (None, s)]
    if any(damaged):
        raise SystemExit(1)


def _line(directory, step: int) -> str:
    """One checkpoint in a table; `good` means sizes and hashes, as the arrays are not read."""
    from capjax.checkpoint import step_directory
    from capjax.checkpoint.files import Damage, checked_metadata

    try:
        metadata = checked_metadata(step_directory(directory, step))
    except (Damage, UserError) as error:
        return f"{step:>10}  {'':>14}  {'':>9}  {'':>8}  NO: {error}"
    size = sum(entry["bytes"] for entry in metadata["files"].values()) / 1e6
    seen, age = metadata["examples_seen"], _age(metadata["created"])
    return f"{step:>10}  {seen:>14,}  {size:>9.1f}  {age:>8}  yes"


def _age(created: str) -> str:
    """Time since an ISO date, in its largest unit."""
    import datetime

    passed = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(created)
    seconds = max(0, round(passed.total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _verify(directory, step: int) -> bool:
    """Prints what is wrong with one checkpoint; whether something is."""
    from capjax.checkpoint import verify

    problems = verify(directory, step)
    for problem in problems:
        print(f"step {step}: {problem}")
    print(f"step {step}: {'DAMAGED' if problems else 'good'}")
    return bool(problems)
