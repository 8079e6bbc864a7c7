r"""SigLIP B/16: pairwise sigmoid, batch 32,768 (Zhai et al. 2023).

capjax train --config=siglip_b16 --workdir=DIR --config.data.source=SOURCE \
    --config.data.tokenizer.path=FILE.model

203.16 M parameters, 139.3 GFLOP an image. The released model's card says 16 TPU v4 for 3 days.
The scale starts at 10 and the bias at -10, as in the released models; the second moment decays by
0.95 at most, which the paper found to be stable at such batches. The rest is the recipe of CapPa.
3 billion images are 4.2e20 FLOP: 1.5e3 chip-hours of a TPU v5e at 40 % of its peak.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import paper_config


def get_config() -> ConfigDict:
    """The config."""
    config = paper_config()
    config.name = "siglip_b16"
    config.batch_size = 32_768
    config.model.update(variant="B/16", text_variant="B", pool="map")
    config.optimizer.b2 = 0.95
    config.objective.captioning.weight = 0.0
    config.objective.contrastive.update(weight=1.0, kind="sigmoid")
    return config
