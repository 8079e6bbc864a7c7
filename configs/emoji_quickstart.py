"""CapPa on the embedded emoji corpus: ten minutes on two CPU cores.

capjax train --config=emoji_quickstart --workdir=runs/quickstart
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The quickstart; `arg` is not used."""
    del arg
    config = ConfigDict()
    config.name = "emoji_quickstart"
    config.seed = 0
    config.batch_size = 128
    config.total_steps = 2000  # or total_examples, or total_epochs: one of the three
    config.total_examples = None
    config.total_epochs = None

    config.mesh = ConfigDict({"replica": 1, "data": -1, "fsdp": 1, "tensor": 1})

    config.data = ConfigDict(
        {
            "source": "emoji:train",
            "styles": ("fluent", "noto"),
            "flags": True,
            "text_length": 14,
            "bad_budget": 0.01,
            # Without a path, a tokenizer is trained on the captions of the source.
            "tokenizer": {
                "path": "",
                "vocab_size": 1600,
                "split_by_whitespace": False,
                "max_examples": 1_000_000,
            },
        }
    )
    # Sources of captions that are used (none: all), with weights (none: equal ones).
    config.captions = ConfigDict({"sources": ("tts",), "weights": (), "lower": True})
    config.preprocessing = ConfigDict({"image_size": 64, "antialias": True, "mode": "stretch"})
    config.augment = ConfigDict(
        {
            "crop_scale": (0.8, 1.0),
            "crop_ratio": (0.9, 1.1),
            "shift_pixels": 2,
            "shift_fill": "white",
            "flip": False,
            "color_jitter": 0.2,
        }
    )
    config.reading = ConfigDict(
        {"num_threads": 2, "num_workers": 0, "prefetch": 4, "cache_megabytes": 256}
    )

    config.model = ConfigDict(
        {
            "patch_size": 16,
            "width": 128,
            "depth": 4,
            "num_heads": 4,
            "mlp_dim": 512,
            "posemb": "learn",
            "decoder_width": 0,
            "decoder_depth": 2,
            "decoder_num_heads": 0,
            "decoder_mlp_dim": 0,
            "decoder_bias": False,
            "dtype": "float32",
            "remat": "none",
            "scan": True,
        }
    )
    config.objective = ConfigDict({"parallel_fraction": 0.5, "label_smoothing": 0.0})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 3e-3,
            "weight_decay": 0.1,
            "b1": 0.9,
            "b2": 0.95,
            "grad_clip_norm": 1.0,
            "schedule": "constant",
            "warmup_steps": 160,
            "cooldown_steps": 1000,
        }
    )
    config.accumulation_steps = 1

    config.checkpoint = ConfigDict({"every_steps": 500, "keep": 3})
    config.log_every_steps = 10
    config.evaluate = ConfigDict(
        {
            "every_steps": 400,
            "batch_size": 128,
            # During training so many examples of each split are used; at the end all of them.
            "max_examples": 128,
            "splits": {
                "composition": "emoji:composition",
                "style": "emoji:style",
                "val": "emoji:val",
                "concept": "emoji:concept",
            },
        }
    )
    config.profile = ConfigDict({"start_step": 0, "num_steps": 0})
    config.tensorboard = True
    config.wandb_project = ""
    return config
