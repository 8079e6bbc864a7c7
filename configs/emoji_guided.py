"""The quickstart with image dropout, for classifier-free guidance: ten minutes on two CPU cores.

capjax train --config=emoji_guided --workdir=runs/guided

A fifth of the images are replaced by zeros, so the decoder learns captions without image too. One
run of one seed, 120 images of the held-out compositions, greedy, exact match: 57.5 % without
guidance, 60.8 % at guidance_scale 1.5, 58.3 % at 2, 35.0 % at 3, 20.0 % at 4.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import default_config


def get_config() -> ConfigDict:
    """The quickstart with image dropout."""
    config = default_config()
    config.name = "emoji_guided"
    config.batch_size = 128
    config.total_steps = 2000

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
    config.objective.captioning.update(
        parallel_fraction=0.5, parallel_draw="bernoulli", image_dropout=0.2
    )
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
    config.evaluate.splits = ConfigDict(
        {
            "composition": "emoji:composition",
            "style": "emoji:style",
            "val": "emoji:val",
            "concept": "emoji:concept",
        }
    )
    return config
