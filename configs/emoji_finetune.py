"""Fine-tuning for guidance on the embedded corpus: half of the images are replaced by nothing.

capjax train --config=emoji_finetune --workdir=runs/guidance --config.warm_start.path=runs/vague
capjax train --config=emoji_finetune:full --workdir=runs/guidance_full \
    --config.warm_start.path=runs/quickstart

vague  goes on from a run of `emoji_vague`, on vague captions
full   goes on from a run of `emoji_quickstart`, on full ones

The recipe of Kornblith et al. 2023 ("Guiding Image Captioning Models Toward More Specific
Captions"), in short: token by token, with image dropout 0.5. The same without it, for comparison:
--config.objective.captioning.image_dropout=0. Then, with other scales at will,
capjax evaluate --workdir=runs/guidance --guidance_scales=1.2,1.5,2,3,4
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import default_config

CORPORA = {"vague": ("emoji:train?vague=0.7", "vague"), "full": ("emoji:train", "tts")}


def get_config(arg: str = "vague") -> ConfigDict:
    """The config on one of `CORPORA`. Raises `ValueError` for a name that is none."""
    if arg not in CORPORA:
        raise ValueError(f"no corpus {arg!r}; name one of {', '.join(CORPORA)}")
    config = default_config()
    config.name = f"emoji_finetune_{arg}"
    config.batch_size = 128
    config.total_steps = 500

    config.data.source, source = CORPORA[arg]
    config.data.styles = ("fluent", "noto")
    config.data.text_length = 14
    config.captions.sources = (source,)
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
    config.objective.captioning.update(parallel_fraction=0.0, image_dropout=0.5)
    config.optimizer.update(
        learning_rate=1e-3,
        weight_decay=0.1,
        b2=0.95,
        schedule="constant",
        warmup_steps=50,
        cooldown_steps=250,
    )

    config.checkpoint.every_steps = 500
    config.evaluate.every_steps = 500
    config.evaluate.max_examples = 128
    config.evaluate.references = ("tts",)
    config.evaluate.lexicon = "emoji"
    config.evaluate.splits = ConfigDict({"composition": "emoji:composition", "val": "emoji:val"})
    return config
