"""The default config says of every field what the dataclass behind it says."""

import dataclasses

import pytest

from capjax.commands.defaults import default_config
from capjax.commands.models import model_fields
from capjax.data.augmentation import Augment
from capjax.data.captions import CaptionChoice
from capjax.data.images import ImagePreprocessing
from capjax.data.pipeline import Reading
from capjax.mesh import MeshShape
from capjax.models.towers import KINDS
from capjax.objectives.captioning_objective import CaptioningObjective
from capjax.objectives.coca import CoCaObjective
from capjax.objectives.contrastive import ContrastiveObjective
from capjax.training.health import Health
from capjax.training.lora import LoRA
from capjax.training.optimizer import OptimizerConfig
from capjax.training.warm_start import WarmStart

CONFIG = default_config()


@pytest.mark.parametrize(
    ("section", "cls", "but"),
    [
        (CONFIG.mesh, MeshShape, {}),
        (CONFIG.augment, Augment, {}),
        (CONFIG.reading, Reading, {}),
        (CONFIG.preprocessing, ImagePreprocessing, {"image_size": 224}),
        (CONFIG.captions, CaptionChoice, {"sources": (), "weights": (), "datasets": {}}),
        # The fixed draw is cheaper, and needs batches that divide.
        (CONFIG.objective.captioning, CaptioningObjective, {"parallel_draw": "fixed"}),
        (CONFIG.objective.contrastive, ContrastiveObjective, {}),
        (CONFIG.objective.coca, CoCaObjective, {}),
        (CONFIG.warm_start, WarmStart, {}),
        (CONFIG.lora, LoRA, {}),
        (CONFIG.health, Health, {}),
        (
            CONFIG.optimizer,
            OptimizerConfig,
            {
                f"{part}_{unit}": None
                for part in ("warmup", "cooldown")
                for unit in ("steps", "examples", "epochs")
            },
        ),
    ],
)
def test_a_section_is_its_dataclass(section, cls, but):
    declared = {field.name: field.default for field in dataclasses.fields(cls)}
    assert section.to_dict() == declared | but


# Taken from the data, the tokenizer and the objective instead.
ELSEWHERE = {"image_size", "vocab_size", "text_length", "mask_token", "eos_id", "text_pad_id"}


def test_the_model_section_has_every_field_of_every_model():
    fields = {f.name: f for _, config in KINDS.values() for f in dataclasses.fields(config)}
    found = model_fields(CONFIG)
    assert found.keys() == fields.keys() - ELSEWHERE
    for name, value in found.items():
        default = fields[name].default
        if default is not dataclasses.MISSING and name != "logit_scale_init":
            assert value == default, name
