r"""Cap B/16: `cappa_b16` with causal prediction alone.

capjax train --config=cap_b16 --workdir=DIR --config.data.source=SOURCE \
    --config.data.tokenizer.path=FILE.model

191.67 M parameters less the mask token's row, 142.5 GFLOP an image; the cost of `cappa_b16`.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import paper_config


def get_config() -> ConfigDict:
    """The config."""
    config = paper_config()
    config.name = "cap_b16"
    config.model.update(variant="B/16", decoder_depth=6)
    config.objective.captioning.parallel_fraction = 0.0
    return config
