"""CapPa on the embedded emoji corpus, four times as long as the quickstart.

capjax train --config=emoji_cappa --workdir=runs/cappa

79 minutes on two CPU cores that other work shared. One run of seed 0, exact match of greedy
captions: composition 78.1 % (F1 .973), val 61.9 %, style 31.6 %. Its parallel mode drafts captions
for its causal one: see docs/performance.md, "Decoding".
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import default_config


def get_config() -> ConfigDict:
    """The quickstart, four times as long."""
    config = default_config()
    config.name = "emoji_cappa"
    config.batch_size = 128
    config.total_steps = 8000

    config.data.source = "emoji:train"
    config.data.styles = ("fluent", "noto")
    config.data.text_length = 14
    config.data.tokenizer.vocab_size = 1600
    config.data.tokenizer.split_by_whitespace = False
    config.captions.sources = ("tts",)
    config.preprocessing.image_size = 64
    config.augment.update(
        crop_scale=(0.8, 1.0),
        crop_ratio=(0.9, 1.1),
        shift_pixels=2,
        shift_fill="white",
        color_jitter=0.2,
    )

    config.model.update(
        patch_size=16, width=128, depth=4, num_heads=4, mlp_dim=512, decoder_depth=2
    )
    config.objective.captioning.update(parallel_fraction=0.5, parallel_draw="bernoulli")
    config.optimizer.update(
        learning_rate=3e-3,
        weight_decay=0.1,
        b2=0.95,
        schedule="constant",
        warmup_steps=160,
        cooldown_steps=4000,
    )

    config.checkpoint.every_steps = 500
    config.evaluate.every_steps = 1000
    config.evaluate.max_examples = 128
    config.evaluate.splits = ConfigDict(
        {
            "composition": "emoji:composition",
            "style": "emoji:style",
            "val": "emoji:val",
            "concept": "emoji:concept",
        }
    )
    return config
