"""Image captioners and contrastive towers as pure functions of a nested dict of parameters."""

from capjax.models.cache import LayerCache
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.coca import CoCa, CoCaConfig
from capjax.models.two_towers import TwoTowers, TwoTowersConfig

__all__ = [
    "Captioner",
    "CaptionerConfig",
    "CoCa",
    "CoCaConfig",
    "LayerCache",
    "TwoTowers",
    "TwoTowersConfig",
]
