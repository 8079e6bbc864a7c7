"""A request's parameters: text fields to checked options."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from capjax.decoding.generate import check_options
from capjax.decoding.loaded_model import LoadedModel
from capjax.decoding.options import DecodingOptions
from capjax.decoding.stream import MAX_SEED
from capjax.errors import UserError, did_you_mean
from capjax.serving.limits import Limits

_OPTIONS = {
    "guidance_scale": float,
    "num_captions": int,
    "temperature": float,
    "top_p": float,
    "num_beams": int,
    "max_length": int,
}
_OTHERS = {"seed": int, "prefix": str, "key": str}
_KINDS = {**_OPTIONS, **_OTHERS}
_MAX_TEXT = 1000
_MAX_GUIDANCE = 20.0
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.01, 10.0  # beyond them float32 logits may overflow


class Parameters(NamedTuple):
    """What a request asks for beside its image."""

    options: DecodingOptions
    seed: int
    prefix: str
    key: str


def parse(fields: Iterable[tuple[str, str]], captioner: LoadedModel, limits: Limits) -> Parameters:
    """The parameters of text fields, `max_length` filled in.

    Raises `UserError` for a field that is unknown, given twice, no number, or beyond its range, and
    for a prefix that leaves no room for a caption.
    """
    found: dict[str, Any] = {}
    for name, text in fields:
        if name not in _KINDS:
            raise UserError(
                f"unknown parameter {name[:50]!r}{did_you_mean(name[:50], _KINDS)} "
                f"(parameters: {', '.join(_KINDS)})"
            )
        if name in found:
            raise UserError(f"{name} is given twice; give it once")
        found[name] = _value(name, text)
    options = DecodingOptions(**{name: found[name] for name in _OPTIONS if name in found})
    _check_limits(options, limits)
    seed = found.get("seed", 0)
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed={seed}: expected 0 to {MAX_SEED}")
    options = dataclasses.replace(options, max_length=check_options(captioner.model, options))
    prefix = found.get("prefix", "")
    count = len(captioner.token_ids(prefix)) if prefix else 0
    if count >= (options.max_length or 0):
        reason = f"leave no room in max_length={options.max_length}"
        raise UserError(f"prefix: its {count} tokens {reason}")
    return Parameters(options, seed, prefix, found.get("key", "0"))


def _value(name: str, text: str) -> int | float | str:
    if len(text) > _MAX_TEXT:
        raise UserError(f"{name} has {len(text)} characters: expected at most {_MAX_TEXT}")
    kind = _KINDS[name]
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"{name}={text[:50]!r}: expected {wanted}") from None


def _check_limits(options: DecodingOptions, limits: Limits) -> None:
    for name, most in (("num_captions", limits.max_captions), ("num_beams", limits.max_beams)):
        if getattr(options, name) > most:
            raise UserError(f"{name}={getattr(options, name)}: this server allows at most {most}")
    (scale,) = options.guidance_scales
    if abs(scale) > _MAX_GUIDANCE:
        raise UserError(f"guidance_scale={scale}: expected {-_MAX_GUIDANCE:g} to {_MAX_GUIDANCE:g}")
    temperature = options.temperature
    if temperature and not _MIN_TEMPERATURE <= temperature <= _MAX_TEMPERATURE:
        raise UserError(
            f"temperature={temperature}: expected 0 (greedy), or {_MIN_TEMPERATURE} to "
            f"{_MAX_TEMPERATURE:g}"
        )
