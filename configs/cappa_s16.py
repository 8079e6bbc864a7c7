r"""CapPa S/16, 6 decoder layers: the small end of a scaling study.

capjax train --config=cappa_s16 --workdir=DIR --config.data.source=SOURCE \
    --config.data.tokenizer.path=FILE.model

60.46 M parameters, 39.5 GFLOP an image. 3 billion images are 1.2e20 FLOP: 4.2e2 chip-hours of a
TPU v5e at 40 % of its peak.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import paper_config


def get_config() -> ConfigDict:
    """The config."""
    config = paper_config()
    config.name = "cappa_s16"
    config.model.update(variant="S/16", decoder_depth=6)
    return config
