r"""CLIP L/14: `clip_b16` at the size of `cappa_l14`.

capjax train --config=clip_l14 --workdir=DIR --config.data.source=SOURCE \
    --config.data.tokenizer.path=FILE.model

Both towers of size L. 640.42 M parameters (the paper's Table 1: 640 M), 601.3 GFLOP an image.
3 billion images are 1.8e21 FLOP: 6.4e3 chip-hours of a TPU v5e at 40 % of its peak.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import paper_config


def get_config() -> ConfigDict:
    """The config."""
    config = paper_config()
    config.name = "clip_l14"
    config.model.update(
        variant="L/14",
        text_variant="L",
        pool="gap",
        text_pool="last",
        image_projection=True,
        logit_scale_init=2.302585092994046,
        logit_bias_init=None,
    )
    config.objective.captioning.weight = 0.0
    config.objective.contrastive.update(weight=1.0, kind="softmax", max_logit_scale=100.0)
    return config
