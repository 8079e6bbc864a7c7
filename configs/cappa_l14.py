r"""CapPa L/14, 12 decoder layers: the large model of the paper.

capjax train --config=cappa_l14 --workdir=DIR --config.data.source=SOURCE \
    --config.data.tokenizer.path=FILE.model

570.18 M parameters (the paper's Table 1: 570 M), 606.0 GFLOP an image. 3 billion images are
1.8e21 FLOP: 6.4e3 chip-hours of a TPU v5e at 40 % of its peak.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import paper_config


def get_config() -> ConfigDict:
    """The config."""
    config = paper_config()
    config.name = "cappa_l14"
    config.model.update(variant="L/14", decoder_depth=12)
    return config
