"""Which axes number matrices, in every model there is."""

import dataclasses

import jax
import pytest

from capjax.models import Captioner, CaptionerConfig
from capjax.models.coca import CoCa, CoCaConfig
from capjax.models.two_towers import TwoTowers, TwoTowersConfig
from capjax.training.layout import layouts
from capjax.training.patterns import by_name

SIZES = {
    "image_size": 8,
    "patch_size": 4,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 40,
    "vocab_size": 30,
    "text_length": 6,
    "qk_norm": True,
}
SMALL = (
    Captioner(CaptionerConfig(**SIZES, null_memory="learned", decoder_bias=True)),
    TwoTowers(TwoTowersConfig(**SIZES, pool="map", num_registers=2)),
    CoCa(CoCaConfig(**SIZES, unimodal_depth=1)),
)


def deeper(model):
    depths = {
        field.name: getattr(model.config, field.name) + 1
        for field in dataclasses.fields(model.config)
        if field.name.endswith("depth")
    }
    if "unimodal_depth" in depths:
        depths["decoder_depth"] += 1
    return type(model)(dataclasses.replace(model.config, **depths))


@pytest.mark.parametrize("model", SMALL, ids=lambda model: type(model).__name__)
def test_layers_are_what_a_deeper_model_has_more_of(model):
    small, large = by_name(model.abstract_params()), by_name(deeper(model).abstract_params())
    stacked = {name for name in small if small[name].shape != large[name].shape}
    assert stacked
    for name, layout in layouts(model.abstract_params(), {}).items():
        fused = {len(layout.sizes) - 2} if "qkv/" in name or "key_value/" in name else set()
        layers = {0} if name in stacked else set()
        assert set(range(len(layout.sizes))) - set(layout.axes) == layers | fused, name
        assert all(small[name].shape[axis] in (2, 3) for axis in fused)


def test_of_equal_axes_the_later_is_the_larger():
    shapes = {"a": (40, 32, 32), "b": (32, 4, 40), "c": (50, 31), "d": (64,)}
    arrays = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    chosen = {name: layout.largest_axes(32) for name, layout in layouts(arrays, {}).items()}
    assert chosen == {"a": (2, 0), "b": (0, 2), "c": None, "d": None}
