"""Image captioners as pure functions of a nested dict of parameters."""

from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.text_decoder import DecoderCache

__all__ = ["Captioner", "CaptionerConfig", "DecoderCache"]
