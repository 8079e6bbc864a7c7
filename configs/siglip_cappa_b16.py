"""SigLIP and CapPa over one image encoder B/16, equally weighed.

capjax train --config=siglip_cappa_b16 --workdir=DIR --config.data.source=… --config.data.tokenizer.path=…

The image encoder runs once a step for both. PARAMS M parameters, GFLOPS GFLOP an image.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import paper_config


def get_config(arg: str = "") -> ConfigDict:
    """The config; `arg` is not used."""
    del arg
    config = paper_config()
    config.name = "siglip_cappa_b16"
    config.model.update(variant="B/16", decoder_depth=6, text_variant="B", pool="map")
    config.objective.contrastive.update(weight=1.0, kind="sigmoid")
    return config
