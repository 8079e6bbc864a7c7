r"""SigLIP and CapPa over one image encoder B/16, equally weighed.

capjax train --config=siglip_cappa_b16 --workdir=DIR --config.data.source=SOURCE \
    --config.data.tokenizer.path=FILE.model

The image encoder runs once a step for both. 309.03 M parameters, 177.0 GFLOP an image.
3 billion images are 5.3e20 FLOP: 1.9e3 chip-hours of a TPU v5e at 40 % of its peak.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import paper_config


def get_config() -> ConfigDict:
    """The config."""
    config = paper_config()
    config.name = "siglip_cappa_b16"
    config.model.update(variant="B/16", decoder_depth=6, text_variant="B", pool="map")
    config.objective.contrastive.update(weight=1.0, kind="sigmoid")
    return config
