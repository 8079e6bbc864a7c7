r"""SigLIP So400m/14: `siglip_b16` with the shape-optimised towers.

capjax train --config=siglip_so400m14 --workdir=DIR --config.data.source=SOURCE \
    --config.data.tokenizer.path=FILE.model

877.42 M parameters, 820.4 GFLOP an image. The released model of 224 pixels reads 16 tokens, the
one of 384 reads 64, as here.
3 billion images are 2.5e21 FLOP: 8.7e3 chip-hours of a TPU v5e at 40 % of its peak.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import paper_config


def get_config() -> ConfigDict:
    """The config."""
    config = paper_config()
    config.name = "siglip_so400m14"
    config.batch_size = 32_768
    config.model.update(variant="So400m/14", text_variant="So400m", pool="map")
    config.optimizer.b2 = 0.95
    config.objective.captioning.weight = 0.0
    config.objective.contrastive.update(weight=1.0, kind="sigmoid")
    return config
