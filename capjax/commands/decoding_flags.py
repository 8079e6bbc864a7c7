"""Flags of the decoding options: names, defaults and help are those of `DecodingOptions`."""

import argparse
import csv
import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from capjax.decoding.options import DecodingOptions


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds a flag for every field of `DecodingOptions`."""
    about = _documented_fields()
    for field in dataclasses.fields(DecodingOptions):
        parse, metavar = _KINDS[field.type]
        shown = "" if field.default in (None, ()) else f" (default {field.default})"
        help_text = about.get(field.name, "").removesuffix(".") + shown
        group.add_argument(
            f"--{field.name}",
            type=parse,
            action="extend" if field.type == Sequence[str] else "store",
            default=argparse.SUPPRESS,
            metavar=metavar,
            help=help_text.replace("%", "%%"),
        )


def from_arguments(args: argparse.Namespace) -> DecodingOptions:
    """The options given. Raises `UserError` for values that are wrong, or do not go together."""
    names = [field.name for field in dataclasses.fields(DecodingOptions)]
    return DecodingOptions(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def _truth(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _numbers(text: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number, or several with commas between, got {text!r}"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]


def _texts(text: str) -> list[str]:
    """Texts with commas between; one with a comma of its own stands in double quotes."""
    return [each for each in next(csv.reader([text], skipinitialspace=True), []) if each]


_KINDS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (int, "N"),
    int | None: (int, "N"),
    float: (float, "X"),
    bool | str: (_truth, "true|false|never"),
    float | Sequence[float]: (_numbers, "X[,X...]"),
    Sequence[str]: (_texts, "TEXT[,TEXT...]"),
}


def _documented_fields() -> dict[str, str]:
    """Field -> what the docstring says of it."""
    attributes = (inspect.getdoc(DecodingOptions) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^  (\w+): ((?:.|\n    )*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
