r"""CLIP B/16: the contrastive baseline that CapPa is compared with, at its recipe and compute.

capjax train --config=clip_b16 --workdir=DIR --config.data.source=SOURCE \
    --config.data.tokenizer.path=FILE.model

Both towers of size B, softmax over the batch in blocks that pass round the mesh. The CapPa paper's
CLIP* is such a model: its code, data, batch of 8192 and schedule are those of the captioners.
196.66 M parameters (the paper's Table 1: 197 M), 137.9 GFLOP an image.
3 billion images are 4.1e20 FLOP: 1.5e3 chip-hours of a TPU v5e at 40 % of its peak.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import paper_config


def get_config() -> ConfigDict:
    """The config."""
    config = paper_config()
    config.name = "clip_b16"
    config.model.update(
        variant="B/16",
        text_variant="B",
        pool="gap",
        text_pool="last",
        image_projection=True,
        logit_scale_init=2.302585092994046,
        logit_bias_init=None,
    )
    config.objective.captioning.weight = 0.0
    config.objective.contrastive.update(weight=1.0, kind="softmax", max_logit_scale=100.0)
    return config
