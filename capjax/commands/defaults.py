"""Every field of a config with its default: a config file sets what differs."""

from ml_collections import ConfigDict


def default_config() -> ConfigDict:
    """The config that every file in `configs/` starts from: CapPa, without a size or a source.

    The sections are taken up by `capjax.commands.build`; what a field means is written at the
    dataclass that its section becomes.
    """
    config = ConfigDict()
    config.name = ""
    config.seed = 0
    config.batch_size = 0
    config.accumulation_steps = 1
    # How long: one of the three.
    config.total_steps = None
    config.total_examples = None
    config.total_epochs = None

    config.mesh = ConfigDict({"replica": 1, "data": -1, "fsdp": 1, "tensor": 1})

    config.data = ConfigDict(
        {
            "source": "",
            # In place of one source several, by names of yours; and how they are weighed from a
            # position on, such as ("0:coco=3;web=1",) (none: by their examples). A resume may
            # append entries.
            "mixture": {},
            "schedule": (),
            # Of the embedded corpus: the styles of drawing (none: all), and whether flags count.
            "styles": (),
            "flags": True,
            "text_length": 64,
            "bad_budget": 0.01,
            # Without a path, a tokenizer is trained on the captions of the source.
            "tokenizer": {
                "path": "",
                "vocab_size": 32_000,
                "split_by_whitespace": True,
                "max_examples": 1_000_000,
            },
        }
    )
    # Sources of captions that are used (none: all), with weights (none: equal ones); captions
    # drawn for each image.
    config.captions = ConfigDict(
        {
            "sources": (),
            "weights": (),
            "lower": True,
            "per_image": 1,
            "sentences": "all",
            "templates": (),
            "max_tokens": 0,
            "score": "",
            "score_edges": (),
            # Of sources of data.mixture, by their names: fields of this section that differ.
            "datasets": {},
        }
    )
    config.preprocessing = ConfigDict(
        {
            "image_size": 224,
            "antialias": True,
            "mode": "stretch",
            "resample": "bilinear",
            "resize_to": 0,
            "exact": False,
        }
    )
    config.augment = ConfigDict(
        {
            "crop_scale": (1.0, 1.0),
            "crop_ratio": (3 / 4, 4 / 3),
            "shift_pixels": 0,
            "shift_fill": "white",
            "flip": False,
            "color_jitter": 0.0,
        }
    )
    config.reading = ConfigDict(
        {"num_threads": 2, "num_workers": 0, "prefetch": 4, "cache_megabytes": 256}
    )

    config.model = ConfigDict(
        {
            # A variant such as "B/16" or "L" fills in the sizes of its tower that are 0 here.
            "variant": "",
            "patch_size": 0,
            "width": 0,
            "depth": 0,
            "num_heads": 0,
            "mlp_dim": 0,
            "posemb": "learn",
            "pool": "gap",
            "num_registers": 0,
            "qk_norm": False,
            "activation": "gelu_tanh",
            "norm_eps": 1e-6,
            "pre_norm": False,
            "image_mean": (0.5, 0.5, 0.5),
            "image_std": (0.5, 0.5, 0.5),
            # The text decoder, of captioning and of CoCa. Sizes of 0: as the image encoder's.
            "decoder_variant": "",
            "decoder_width": 0,
            "decoder_depth": 0,
            "decoder_num_heads": 0,
            "decoder_mlp_dim": 0,
            "decoder_bias": False,
            "decoder_posemb": "",
            "decoder_qk_norm": False,
            "mask_padding": False,
            "null_memory": "zeros",
            # CoCa's own: decoder layers without cross-attention (0: half), pooled image tokens.
            "unimodal_depth": 0,
            "caption_queries": 256,
            # The text encoder of the contrastive objective. Sizes of 0: as the image encoder's.
            "text_variant": "",
            "text_width": 0,
            "text_depth": 0,
            "text_num_heads": 0,
            "text_mlp_dim": 0,
            "text_causal": False,
            "text_pool": "last",
            "embedding_dim": 0,
            "image_projection": False,
            "text_projection_bias": True,
            "logit_scale_init": 2.302585092994046,
            "logit_bias_init": -10.0,
            "dtype": "float32",
            "remat": "none",
            "scan": True,
            "attention": "auto",
        }
    )
    # What is minimised: the sum of these, weighed; a weight of 0 leaves an objective out.
    config.objective = ConfigDict(
        {
            "captioning": {
                "weight": 1.0,
                "parallel_fraction": 0.75,
                "parallel_draw": "fixed",
                "masking_ratio": 1.0,
                "score_visible": True,
                "image_dropout": 0.0,
                "label_smoothing": 0.0,
                "z_loss": 0.0,
                "normalization": "caption",
                "smile_weight": 0.0,
                "smile_first_token": True,
                "smile_subset": "label",
            },
            "contrastive": {
                "weight": 0.0,
                "kind": "sigmoid",
                "chunked": True,
                "chunk_size": 0,
                "label_smoothing": 0.0,
                "max_logit_scale": 0.0,
            },
            "coca": {
                "weight": 0.0,
                "caption_weight": 2.0,
                "contrastive_weight": 1.0,
                "chunked": True,
                "max_logit_scale": 0.0,
                "image_dropout": 0.0,
                "label_smoothing": 0.0,
                "z_loss": 0.0,
                "normalization": "token",
            },
        }
    )
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "momentum": 0.95,
            "grad_clip_norm": 1.0,
            "schedule": "cosine",
            # Each in steps, examples or epochs: warmup_examples, cooldown_epochs, …
            "warmup_steps": None,
            "warmup_examples": None,
            "warmup_epochs": None,
            "cooldown_steps": None,
            "cooldown_examples": None,
            "cooldown_epochs": None,
            "timescale": 10_000.0,
            "first_moment_dtype": "float32",
            "second_moment_dtype": "float32",
            "ema_decay": 0.0,
            "layer_decay": 1.0,
            "multipliers": (),
            "freeze": (),
        }
    )
    # Low-rank products trained on top of kernels, which stay as they are; a rank of 0: none.
    config.lora = ConfigDict(
        {"rank": 0, "alpha": 16.0, "targets": (".*attention",), "train": (), "init_std": 0.0}
    )
    # Parameters to start from: a workdir or a checkpoint, and patterns of what is taken from it.
    config.warm_start = ConfigDict({"path": "", "include": (), "exclude": ()})

    # The newest `keep` are kept, multiples of `keep_every_steps` (0: none), and the `keep_best` of
    # those whose evaluation was best by `best_metric` ("eval/<split>/<metric>"; "": none).
    config.checkpoint = ConfigDict(
        {
            "every_steps": 1000,
            "keep": 3,
            "keep_every_steps": 0,
            "best_metric": "",
            "best_mode": "max",
            "keep_best": 1,
        }
    )
    config.log_every_steps = 10
    # What is done about numbers that go wrong (see `capjax.training.health`, docs/reliability.md).
    config.health = ConfigDict(
        {
            "max_skipped_in_a_row": 10,
            "max_skipped_share": 0.1,
            "skipped_window": 200,
            "spike_action": "none",
            "spike_metrics": ("loss", "grad_norm"),
            "spike_window": 128,
            "spike_factor": 6.0,
            "rollback_steps": 10,
            "max_rollbacks": 3,
            "watchdog_s": 1800.0,
            "watchdog_slow_s": 21_600.0,
            "memory_share": 0.9,
            "data_wait_share": 0.25,
        }
    )
    # During training `max_examples` of each split are used; at the end all of them. `references`:
    # their sources of captions, where these are not those of `captions.sources`. Beside
    # likelihood, captions and retrieval: `probes` on frozen features, which learn from
    # `probe_source` ("": `data.source`) and whose classes a file of `labels` names; tests of
    # `composition` (NAME or NAME=FILE;IMAGES); a `judge` of the captions, a checkpoint of towers;
    # captions with other `guidance_scales`; and a `lexicon` of what captions may hallucinate.
    config.evaluate = ConfigDict(
        {
            "every_steps": 1000,
            "batch_size": 128,
            "max_examples": 1024,
            "splits": {},
            "references": (),
            "probes": False,
            "probe_source": "",
            "probe_examples": 50_000,
            "labels": "",
            "composition": (),
            "judge": "",
            "judge_prompt": "A photo depicts ",
            "guidance_scales": (),
            "lexicon": "",
        }
    )
    config.profile = ConfigDict({"start_step": 0, "num_steps": 0})
    config.tensorboard = True
    config.wandb_project = ""
    return config


def paper_config() -> ConfigDict:
    """What the configs at the scale of the CapPa paper share: 3 billion pairs at 224 pixels.

    The recipe is big_vision's `configs/proj/cappa/pretrain.py`, whose optimizer it is too. The
    data are the user's: `data.source`, and `data.tokenizer.path` for a SentencePiece model.
    """
    config = default_config()
    config.batch_size = 8192
    config.total_examples = 3_000_000_000
    config.preprocessing.update(image_size=224, antialias=False, mode="stretch")
    config.data.text_length = 64
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.optimizer.update(
        name="big_vision_adafactor",
        learning_rate=1e-3,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=10_000,
    )
    config.reading.update(num_threads=16, num_workers=8, prefetch=2, cache_megabytes=0)
    config.mesh.update(data=1, fsdp=-1)
    config.checkpoint.update(every_steps=1000, keep=3)
    config.log_every_steps = 50
    config.evaluate.update(every_steps=5000, batch_size=1024, max_examples=10_000)
    return config
