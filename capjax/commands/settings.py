"""Configs: finding and loading them, overrides, and frozen dataclasses made from their sections.

A config is a Python file with `get_config() -> ConfigDict`, or `get_config(arg: str = "")` to take
what stands behind a colon: numbers, strings, tuples.
Every mistake is a `UserError` of one line that names the field, the value and the mend.
"""

import ast
import dataclasses
import inspect
import math
import re
import runpy
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from capjax.errors import UserError, did_you_mean

SCALE = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
TRUTH = {"true": True, "1": True, "false": False, "0": False}
EXPECTED = {
    bool: "true or false",
    int: "a whole number (such as 100, 1e3, 10k or 2M)",
    float: "a number (such as 0.1 or 1e-3)",
    str: "text",
    tuple: "a list (such as 1,2 or a,b)",
}
OPEN_SECTIONS = (
    "evaluate.splits",
    "data.mixture",
    "rewards.functions",
)  # of text, by names that are the user's
# By names that are the user's too, but with the fields of the section that it is in.
OPEN_SUBSECTION = "captions.datasets"
_Value = typing.Any  # whatever a config field holds


def load_config(arg: str, overrides: list[str] | tuple[str, ...] = ()) -> ConfigDict:
    """The locked config that `arg` names, with `a.b=v` overrides applied in order.

    `arg` is the path of a .py file or the name of a shipped config; `:x` after either hands "x" to
    its `get_config`. Raises `UserError`.
    """
    name, _, get_config_arg = arg.partition(":")
    path = _find(name)
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config and get_config_arg and not inspect.signature(get_config).parameters:
            raise TypeError(
                f"get_config() takes no argument, got {get_config_arg!r}; "
                "--config.a.b=v sets a field"
            )
        config = get_config(*[get_config_arg] * bool(get_config_arg)) if get_config else None
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"--config={arg}: {path} raised {what}") from error
    if not isinstance(config, ConfigDict):
        came = "returns no ConfigDict" if get_config else "has no get_config()"
        raise UserError(
            f"--config={arg}: {path} {came}; write `def get_config(arg=''):` that returns an "
            "ml_collections.ConfigDict"
        )
    config.lock()
    for override in overrides:
        _override(config, override.removeprefix("--config."))
    return config


def check_supervised(config: ConfigDict, arg: str) -> None:
    """Raises `UserError` for the config of another stage, which `arg` named."""
    if "policy" in config:
        raise UserError(
            f"--config={arg} is one of reinforcement, whose model is that of a checkpoint: "
            "`capjax reinforce` runs it"
        )


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configs that come with capjax, in alphabetical order."""
    package = Path(__file__).parents[1]
    # In a wheel they lie inside the package; in a checkout (editable installs too) beside it.
    inside = package / "configs"
    directory = inside if inside.is_dir() else package.parent / "configs"
    return {p.stem: p for p in sorted(directory.glob("*.py")) if not p.stem.startswith("_")}


def summary(path: Path) -> str:
    """The first line of a config file's docstring, or nothing."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def resolved_dict(config: ConfigDict) -> dict:
    """The config as nested dicts of JSON values, tuples as lists. Raises `UserError` for others."""
    return _to_json(config, "config")


def flatten(tree: dict, prefix: str = "") -> dict[str, _Value]:
    """Dotted name -> value of every field of nested dicts, in alphabetical order."""
    fields = {}
    for key in sorted(tree):
        if isinstance(tree[key], dict):
            fields |= flatten(tree[key], f"{prefix}{key}.")
        else:
            fields[prefix + key] = tree[key]
    return fields


def from_dataclass_kwargs(cls, section, name: str):
    """`cls(**section)`, with each field checked against its annotation.

    `section` is a ConfigDict or dict, `name` what the user calls it ("optimizer"). Whole numbers
    pass as floats, lists as tuples, sections as nested dataclasses. Raises `UserError`.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    values = {}
    for key, value in section.items():
        if key not in fields:
            hint = did_you_mean(key, fields) or f"; its fields are {', '.join(fields)}"
            raise UserError(f"{name}.{key}={value}: no such field{hint}")
        values[key] = _conform(value, hints[key], f"{name}.{key}")
    for key, field in fields.items():
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if no_default and key not in values:
            raise UserError(f"{name}.{key} is missing; set it to {_describe(hints[key])}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from error


def parse_value(text: str, current: _Value, kind: type, name: str) -> _Value:
    """The value that `text` means for a field of type `kind` that now holds `current`.

    A field that holds None takes None again, or anything its type allows (any literal where it has
    none). Raises `UserError` naming the field, what came and what was expected.
    """
    if current is None and text.lower() in ("none", "null"):
        return None
    try:
        if kind is bool:
            return _truth(text)
        if kind is int:
            return _whole(text)
        if kind is float:
            return _number(text)
        if kind in (tuple, list):
            return kind(_items(text, current or ()))
    except (KeyError, TypeError, ValueError, SyntaxError, MemoryError, RecursionError):
        expected = EXPECTED[tuple if kind is list else kind]
        raise UserError(f"--config.{name}={text}: expected {expected}") from None
    return text if kind is str else _literal(text)


def _find(name: str) -> Path:
    """The file of a config given by path or by name."""
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.is_file() and path.suffix == ".py":
        return path
    if path.suffix == ".py" or path.exists():
        why = "is no Python file" if path.exists() else "does not exist"
        raise UserError(f"--config={name}: the file {why}{did_you_mean(path.stem, shipped)}")
    raise UserError(
        f"--config={name}: no shipped config of that name{did_you_mean(name, shipped)} "
        f"(shipped: {', '.join(shipped)}; or give the path of a .py file)"
    )


def _override(config: ConfigDict, text: str) -> None:
    """Sets one field of `config` from `a.b=v`."""
    name, _, value = text.partition("=")
    *sections, key = name.split(".")
    if ".".join(sections[:-1]) == OPEN_SUBSECTION:
        _override_own(config, sections, key, value)
        return
    parent = node = config
    for part in [*sections, key]:
        is_open = part is key and value and ".".join(sections) in OPEN_SECTIONS
        if is_open and isinstance(node, ConfigDict):
            with config.unlocked():
                node[key] = value
            return
        if not isinstance(node, ConfigDict) or part not in node:
            raise UserError(f"--config.{text}: no such field{_nearest(config, name)}")
        parent, node = node, node[part]
    if isinstance(node, ConfigDict):
        raise UserError(
            f"--config.{text}: {name} is a section; set one of its fields: {', '.join(node)}"
        )
    parent[key] = parse_value(value, node, parent.get_type(key), name)


def _override_own(config: ConfigDict, sections: list[str], key: str, value: str) -> None:
    """Sets a field for one of the names of the open subsection, as its section's own is typed."""
    parent, child, of = sections
    known, name = config[parent], ".".join([*sections, key])
    if key not in known or key == child:
        hint = did_you_mean(key, known) or f"; its fields are {', '.join(known)}"
        raise UserError(f"--config.{name}={value}: no such field{hint}")
    before = known.get(child, {}).get(of, {})
    parsed = parse_value(value, known[key], known.get_type(key), name)
    with config.unlocked():
        known[child] = ConfigDict({**known.get(child, {}), of: {**before, key: parsed}})


def _nearest(config: ConfigDict, name: str) -> str:
    """A suggestion for a field that is not there: near as a whole, or the same last name."""
    known = list(flatten(config.to_dict()))
    *sections, key = name.split(".")
    same = [field for field in known if field.split(".")[-1] == key]
    if same:
        return f"; did you mean {same[0]}?"
    siblings = [f for f in known if f.split(".")[:-1] == sections]
    near = did_you_mean(name, siblings) or did_you_mean(name, known)
    return near or f"; fields there: {', '.join(siblings or config)}"


def _truth(text: str) -> bool:
    return TRUTH[text.strip().lower()]


def _number(text: str) -> float:
    """`1e-3`, `10k`, `2.5M`. Raises ValueError."""
    match = re.fullmatch(r"(.*?[\d.])([kKMGB]?)", text.strip())
    value = float(match[1]) * SCALE[match[2]] if match else float(text)
    if not math.isfinite(value):  # JSON has no word for it
        raise ValueError("not finite")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)  # exact for integers that a float cannot hold
    except ValueError:
        value = _number(text)
        if not value.is_integer():
            raise ValueError("not whole") from None
        return int(value)


def _items(text: str, current: Sequence) -> list:
    """The items of `(1,2)`, `[1,2]`, `1,2` or `a,b`, typed as those that are there now."""
    inner = text.strip()
    if "(" in inner[1:] or "[" in inner[1:]:  # lists of lists
        return [*ast.literal_eval(inner)]
    if inner[:1] + inner[-1:] in ("()", "[]"):
        inner = inner[1:-1]
    kinds = {type(item) for item in current}
    kind = kinds.pop() if len(kinds) == 1 else None
    parts = [part.strip().strip("'\"") for part in inner.split(",")]
    if parts[-1] == "":
        parts.pop()  # "(1,)", and the empty list
    if kind is str:
        return parts
    readers: dict[type | None, Callable] = {bool: _truth, int: _whole, float: _number}
    return [readers.get(kind, _literal)(part) for part in parts]


def _literal(text: str) -> _Value:
    """A Python literal, or the text itself."""
    if text.lower() in ("true", "false"):
        return TRUTH[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _to_json(value: _Value, name: str) -> typing.Any:
    if isinstance(value, ConfigDict | Mapping):
        return {str(k): _to_json(value[k], f"{name}.{k}") for k in sorted(value.keys(), key=str)}
    if isinstance(value, tuple | list):
        return [_to_json(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"{name} is a {type(value).__name__}; a config holds numbers, text, true, false, None, "
        "tuples and sections only"
    )


def _conform(value: _Value, hint: typing.Any, name: str) -> _Value:
    """`value` as the annotation `hint` wants it. Raises `UserError` where it does not fit."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, ConfigDict | Mapping):
        return from_dataclass_kwargs(hint, value, name)
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            try:
                return _conform(value, option, name)
            except UserError:
                continue
    elif origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
        near = did_you_mean(str(value), map(str, typing.get_args(hint)))
        raise UserError(f"{name}={value}: expected {_describe(hint)}{near}")
    elif origin is tuple and isinstance(value, tuple | list):
        kinds = typing.get_args(hint)
        kinds = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
        if len(kinds) == len(value):
            pairs = enumerate(zip(value, kinds, strict=True))
            return tuple(_conform(item, kind, f"{name}[{i}]") for i, (item, kind) in pairs)
    elif isinstance(value, int) and not isinstance(value, bool) and hint in (int, float):
        return value if hint is int else float(value)
    elif hint is typing.Any or (hint is not int and isinstance(value, origin or hint)):
        return value
    raise UserError(f"{name}={value}: expected {_describe(hint)}, got {type(value).__name__}")


def _describe(hint: typing.Any) -> str:
    """An annotation in words."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if hint is type(None):
        return "None"
    return EXPECTED.get(typing.get_origin(hint) or hint, getattr(hint, "__name__", str(hint)))
