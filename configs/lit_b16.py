r"""LiT B/16: a text tower on a frozen image encoder (Zhai et al. 2022), with SigLIP's loss.

capjax train --config=lit_b16 --workdir=DIR --config.data.source=SOURCE \
    --config.data.tokenizer.path=FILE.model

The encoder comes from a run of `cappa_b16` (or any other): give its workdir as
--config.warm_start.path=DIR. 203.16 M parameters, of which the encoder's 85.80 M stay as they are;
139.3 GFLOP an image, counted as if all were trained. An attention pooling head on the encoder is
trained too. The paper's loss: --config.objective.contrastive.kind=softmax
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import paper_config


def get_config() -> ConfigDict:
    """The config."""
    config = paper_config()
    config.name = "lit_b16"
    config.batch_size = 16_384
    config.total_examples = 900_000_000
    config.model.update(variant="B/16", text_variant="B", pool="map", logit_bias_init=-2.71)
    config.objective.captioning.weight = 0.0
    config.objective.contrastive.update(weight=1.0, kind="sigmoid")
    config.warm_start.include = ("encoder",)
    config.optimizer.freeze = ("encoder/.*",)
    return config
