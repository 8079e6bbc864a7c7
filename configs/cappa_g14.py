r"""CapPa g/14, 12 decoder layers: a billion parameters in the encoder.

capjax train --config=cappa_g14 --workdir=DIR --config.data.source=SOURCE \
    --config.data.tokenizer.path=FILE.model

1499.42 M parameters, 1824.9 GFLOP an image.
3 billion images are 5.5e21 FLOP: 1.9e4 chip-hours of a TPU v5e at 40 % of its peak.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import paper_config


def get_config() -> ConfigDict:
    """The config."""
    config = paper_config()
    config.name = "cappa_g14"
    config.model.update(variant="g/14", decoder_depth=12, remat="full")
    return config
