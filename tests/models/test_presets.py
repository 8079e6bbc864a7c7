"""Variants by name give the published counts of parameters."""

import pytest

from capjax.errors import UserError
from capjax.models import Captioner, CaptionerConfig, TwoTowers, TwoTowersConfig
from capjax.models.presets import variant


@pytest.mark.parametrize(
    ("name", "decoder_depth", "millions"),
    [
        ("S/16", 6, 60.46),
        ("M/16", 6, 96.33),
        ("B/16", 6, 191.67),
        ("L/14", 6, 469.50),
        ("L/14", 12, 570.18),
        ("g/14", 12, 1499.42),
    ],
)
def test_captioners(name, decoder_depth, millions):
    """Counts of big_vision's CapPa at 224 px with 32,000 tokens."""
    config = CaptionerConfig(
        image_size=224, vocab_size=32_000, decoder_depth=decoder_depth, **variant(name)
    )
    assert round(Captioner(config).num_params() / 1e6, 2) == millions


def test_siglip():
    """Count of big_vision's SigLIP B/16 at 224 px with 32,000 tokens."""
    config = TwoTowersConfig(image_size=224, vocab_size=32_000, pool="map", **variant("B/16"))
    assert round(TwoTowers(config).num_params() / 1e6, 2) == 203.16


def test_without_a_patch_size():
    assert variant("So400m") == {"width": 1152, "depth": 27, "num_heads": 16, "mlp_dim": 4304}
    assert variant("So400m/14") == variant("So400m") | {"patch_size": 14}


@pytest.mark.parametrize("size", ["mu", "Ti", "S", "B", "L", "So400m", "H", "g-opt", "G", "e"])
def test_sizes_make_configurations(size):
    config = CaptionerConfig(image_size=32, vocab_size=8, **variant(f"{size}/16"))
    assert config.width % config.num_heads == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SO400M/14", "variant='SO400M/14': no size is called 'SO400M'; .* choose one of mu, Ti"),
        ("g-op/14", r"no size is called 'g-op'; did you mean g-opt\?"),
        ("", "no size is called ''; choose one of"),
        ("B/", "expected a patch size in pixels, such as B/16"),
        ("L/x", "expected a patch size in pixels, such as L/16"),
        ("L/0", "expected a patch size in pixels, such as L/16"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        variant(name)
