"""`capjax config`: the shipped configs, one of them resolved, or the difference of two."""

import argparse
import json

from capjax.commands import settings
from capjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `list`, `show` and `diff`."""
    parser.set_defaults(config=None)  # says to cli that --config.a.b=v is welcome here
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|show|diff")
    actions.add_parser("list", help="names and what they are", allow_abbrev=False)
    show = actions.add_parser("show", help="every field, with overrides", allow_abbrev=False)
    show.add_argument("name", help="a shipped config, or a path; NAME:ARG hands ARG to it")
    diff = actions.add_parser("diff", help="fields that differ", allow_abbrev=False)
    diff.add_argument("a", help="a shipped config, or a path")
    diff.add_argument("b", help="a shipped config, or a path")


def run(args: argparse.Namespace) -> None:
    """Prints to stdout. Raises `UserError` for a config that cannot be loaded."""
    if args.overrides and args.action != "show":
        raise UserError(f"config {args.action} takes no --config.{args.overrides[0]}; show does")
    if args.action == "list":
        names = settings.shipped_configs()
        width = max(map(len, names), default=0)
        for name, path in names.items():
            print(f"{name:<{width}}  {settings.summary(path)}")
    elif args.action == "show":
        for field, value in _fields(args.name, args.overrides).items():
            print(f"{field} = {value}")
    else:
        a, b = _fields(args.a, []), _fields(args.b, [])
        for field in sorted(a.keys() | b.keys()):
            if a.get(field) != b.get(field):
                for sign, side in (("-", a), ("+", b)):
                    if field in side:
                        print(f"{sign} {field} = {side[field]}")


def _fields(name: str, overrides: list[str]) -> dict[str, str]:
    """Every field of a config by its dotted name, in alphabetical order, as JSON text."""
    tree = settings.resolved_dict(settings.load_config(name, overrides))
    return {field: json.dumps(value) for field, value in settings.flatten(tree).items()}
