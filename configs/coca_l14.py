r"""CoCa with a ViT-L/14: `coca_b32` at the size of the paper's Large.

capjax train --config=coca_l14 --workdir=DIR --config.data.source=SOURCE \
    --config.data.tokenizer.path=FILE.model

The recipe is that of the captioners, not the paper's. 731.95 M parameters, 674.4 GFLOP an image.
3 billion images are 2.0e21 FLOP: 7.1e3 chip-hours of a TPU v5e at 40 % of its peak.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import paper_config


def get_config() -> ConfigDict:
    """The config."""
    config = paper_config()
    config.name = "coca_l14"
    config.model.update(
        variant="L/14",
        decoder_variant="L",
        decoder_depth=24,
        caption_queries=256,
        logit_scale_init=2.6592600369327783,
        logit_bias_init=None,
    )
    config.objective.captioning.weight = 0.0
    config.objective.coca.update(
        weight=1.0, caption_weight=2.0, contrastive_weight=1.0, max_logit_scale=100.0
    )
    return config
