"""The quickstart on vague captions: each attribute is left out of seven captions in ten.

capjax train --config=emoji_vague --workdir=runs/vague

The skin tones, the genders and each manner (hair, direction, what is worn or carried) of a caption
are left out with probability 0.7, so that likelihood learns to say less than the image shows. The
references are the full captions: `mention_recall` and `mention_precision`, `tone_recall` and so on,
say how much of the attributes is said, and how much of what is said is true.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import default_config


def get_config() -> ConfigDict:
    """The quickstart, on vague captions."""
    config = default_config()
    config.name = "emoji_vague"
    config.batch_size = 128
    config.total_steps = 2000

    config.data.source = "emoji:train?vague=0.7"
    config.data.styles = ("fluent", "noto")
    config.data.text_length = 14
    config.data.tokenizer.vocab_size = 1600
    config.data.tokenizer.split_by_whitespace = False
    config.captions.sources = ("vague",)
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
        cooldown_steps=1000,
    )

    config.checkpoint.every_steps = 500
    config.evaluate.every_steps = 400
    config.evaluate.max_examples = 128
    config.evaluate.references = ("tts",)
    config.evaluate.lexicon = "emoji"
    config.evaluate.splits = ConfigDict(
        {
            "composition": "emoji:composition",
            "style": "emoji:style",
            "val": "emoji:val",
            "concept": "emoji:concept",
        }
    )
    return config
