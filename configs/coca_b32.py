r"""CoCa with a ViT-B/32: captions and contrast from one text decoder (Yu et al. 2022).

capjax train --config=coca_b32 --workdir=DIR --config.data.source=SOURCE \
    --config.data.tokenizer.path=FILE.model

12 + 12 decoder layers of width 768, 256 pooled image tokens, the paper's cascade of poolers and
its weights: 2 for captions, 1 for contrast. The recipe is that of the captioners, to compare with
them: neither the paper's batch of 65,536 nor its 288 pixels in patches of 18.
341.02 M parameters, 134.2 GFLOP an image.
3 billion images are 4.0e20 FLOP: 1.4e3 chip-hours of a TPU v5e at 40 % of its peak.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import paper_config


def get_config() -> ConfigDict:
    """The config."""
    config = paper_config()
    config.name = "coca_b32"
    config.model.update(
        variant="B/32",
        decoder_variant="B",
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
