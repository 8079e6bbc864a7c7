"""From a config to its models and objectives."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from capjax.commands.settings import from_dataclass_kwargs
from capjax.data.tokenizer import EOS_ID
from capjax.errors import UserError, did_you_mean
from capjax.models.presets import variant
from capjax.models.towers import KINDS, Towers
from capjax.objectives.combined import Objectives

# Which tower's sizes a variant fills in, and how its fields begin.
_VARIANTS = {"variant": "", "decoder_variant": "decoder_", "text_variant": "text_"}


def build_objectives(config: ConfigDict) -> Objectives:
    """Takes up the section `objective`. Raises `UserError`."""
    return from_dataclass_kwargs(Objectives, config.objective, "objective")


def build_towers(
    config: ConfigDict, objectives: Objectives, vocab_size: int, eos_id: int = EOS_ID
) -> Towers:
    """The models that the objectives need.

    What follows from the data and the tokenizer is taken from there, not from the section `model`.
    Raises `UserError`.
    """
    if eos_id != EOS_ID and (objectives.captioning.weight or objectives.coca.weight):
        raise UserError(
            f"the tokenizer ends a text with token {eos_id}; captions need one that ends with "
            f"{EOS_ID} and pads with 0, as those that capjax trains do"
        )
    fields = model_fields(config) | {
        "image_size": config.preprocessing.image_size,
        "text_length": config.data.text_length,
        "vocab_size": vocab_size,
        "eos_id": eos_id,
        "text_pad_id": eos_id,
        "mask_token": objectives.captioning.parallel_fraction > 0,
    }
    known = {kind: {f.name for f in dataclasses.fields(KINDS[kind][1])} for kind in KINDS}
    for name in fields:
        if not any(name in names for names in known.values()):
            every = set().union(*known.values())
            raise UserError(f"model.{name}: no such field{did_you_mean(name, every)}")
    made: dict[str, Any] = {}
    for kind in objectives.models_needed():
        model, config_class = KINDS[kind]
        section = {name: value for name, value in fields.items() if name in known[kind]}
        made[kind] = model(from_dataclass_kwargs(config_class, section, "model"))
    return Towers(**made)


def model_fields(config: ConfigDict) -> dict[str, Any]:
    """The section `model`, sizes of 0 filled in from the variants that it names."""
    fields = dict(config.model)
    for field, prefix in _VARIANTS.items():
        name = fields.pop(field)
        if not name:
            continue
        sizes = {prefix + size: value for size, value in variant(name).items()}
        sizes = {key: value for key, value in sizes.items() if key in fields}
        if all(fields[key] for key in sizes):
            given = ", ".join(f"{key}={fields[key]}" for key in sizes)
            raise UserError(
                f"model.{field}={name} changes nothing: {given} are set; set those to 0 that it "
                "shall fill in"
            )
        fields |= {key: value for key, value in sizes.items() if not fields[key]}
    return fields
