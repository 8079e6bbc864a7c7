"""CLIP L/14: `clip_b16` at the size of `cappa_l14`.

capjax train --config=clip_l14 --workdir=DIR --config.data.source=… --config.data.tokenizer.path=…

PARAMS M parameters, GFLOPS GFLOP an image.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import paper_config


def get_config(arg: str = "") -> ConfigDict:
    """The config; `arg` is not used."""
    del arg
    config = paper_config()
    config.name = "clip_l14"
    config.model.update(
        variant="L/14",
        text_variant="L",
        text_depth=12,
        pool="map",
        text_pool="last",
        image_projection=True,
        logit_scale_init=2.302585092994046,
        logit_bias_init=None,
    )
    config.objective.captioning.weight = 0.0
    config.objective.contrastive.update(weight=1.0, kind="softmax", max_logit_scale=100.0)
    return config
