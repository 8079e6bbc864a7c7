"""Every objective on the embedded emoji corpus, at the quickstart's size and compute.

capjax train --config=emoji_objectives:NAME --workdir=runs/NAME, with one of the names below.

cap            captions token by token
cappa          captions token by token, and half of the rows all tokens in parallel
icmlm          masked captioning: hidden tokens from the image and the visible tokens
clip           image and text towers, softmax over the pairs of the batch
siglip         image and text towers, sigmoid of each pair
coca           captions and CLIP's loss from one decoder
siglip_cappa   siglip and cappa over one image encoder

Each takes about ten minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from capjax.commands.defaults import default_config

NAMES = ("cap", "cappa", "icmlm", "clip", "siglip", "coca", "siglip_cappa")


def get_config(arg: str = "cappa") -> ConfigDict:
    """The config of one objective. Raises `ValueError` for a name that is none."""
    if arg not in NAMES:
        raise ValueError(f"no objective {arg!r}; name one of {', '.join(NAMES)}")
    config = default_config()
    config.name = f"emoji_{arg}"
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
        crop_scale=(0.8, 1.0), crop_ratio=(0.9, 1.1), shift_pixels=2, color_jitter=0.2
    )
    config.model.update(
        patch_size=16,
        width=128,
        depth=4,
        num_heads=4,
        mlp_dim=512,
        decoder_depth=4 if arg == "coca" else 2,
        caption_queries=16,
        text_depth=2,
    )
    _set_objective(config, arg)
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
        {"composition": "emoji:composition", "style": "emoji:style", "val": "emoji:val"}
    )
    return config


def _set_objective(config: ConfigDict, name: str) -> None:
    """The weights of the objectives, and what each needs of the model."""
    captioning, contrastive = config.objective.captioning, config.objective.contrastive
    captioning.parallel_fraction = {"cap": 0.0, "icmlm": 1.0}.get(name, 0.5)
    if name == "icmlm":
        captioning.update(masking_ratio=0.5, score_visible=False)
    if name in ("clip", "siglip", "coca"):
        captioning.weight = 0.0
    if name == "coca":
        config.objective.coca.weight = 1.0
        config.model.update(logit_scale_init=2.6592600369327783, logit_bias_init=None)
    if name == "clip":
        contrastive.update(weight=1.0, kind="softmax", max_logit_scale=100.0)
        config.model.update(
            text_causal=True,
            text_pool="eos",
            image_projection=True,
            embedding_dim=64,
            logit_scale_init=2.6592600369327783,
            logit_bias_init=None,
        )
    if name in ("siglip", "siglip_cappa"):
        contrastive.update(weight=1.0, kind="sigmoid")
        config.model.pool = "map"
