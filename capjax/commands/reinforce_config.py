"""Every field of a reinforcement config with its default."""

from ml_collections import ConfigDict

from capjax.commands.defaults import default_config


def reinforce_config() -> ConfigDict:
    """The config that reinforcement configs start from: leave-one-out, and no reward yet.

    Sections that `capjax train` has mean the same; the model, its tokenizer and the preprocessing
    are those of `warm_start.path`.
    """
    config = default_config()
    config.batch_size = 64
    del config.model, config.preprocessing, config.data.text_length, config.data.tokenizer
    del config.objective, config.warm_start.include, config.warm_start.exclude
    # "": as the checkpoint has it.
    config.compute = ConfigDict({"dtype": "", "remat": ""})
    # An algorithm of `capjax.objectives.policy_gradient.ALGORITHMS` sets what is None here.
    config.policy = ConfigDict(
        {
            "algorithm": "rloo",
            "baseline": None,
            "scale_by_std": None,
            "std_floor": None,
            "whiten": None,
            "clip_low": None,
            "clip_high": None,
            "sequence_ratio": None,
            "aggregation": None,
            "kl_weight": None,
            "kl_estimator": None,
            "kl_in_reward": None,
            "kl_target": None,
            "entropy_weight": None,
            "likelihood_weight": None,
            "preference_weight": None,
        }
    )
    config.sampling = ConfigDict(
        {
            "num_samples": 5,
            "temperature": 1.0,
            "max_length": 0,
            "prefix": "",
            "num_updates": 1,
        }
    )
    # `towers`: a checkpoint; `prompt`: what they read before each caption. `functions`: by names of
    # yours, a Python file (weight 1), or {"file": ..., "weight": ..., "normalize": ...}.
    weighed = {"weight": 0.0, "normalize": "none"}
    config.rewards = ConfigDict(
        {
            "towers": "",
            "prompt": "",
            "batch_size": 128,
            "self_retrieval": weighed
            | {"form": "log", "among": "batch", "scale": 0.0, "num_negatives": 0},
            "clip_score": weighed,
            "ref_clip_score": weighed | {"definition": "hessel"},
            "cider_d": weighed | {"on": "host"},
            "grammar": weighed
            | {
                "head": "",
                "train_tower": False,
                "tower": {
                    "steps": 1000,
                    "batch_size": 256,
                    "learning_rate": 1e-5,
                    "grammar_weight": 1.0,
                },
            },
            "length": weighed | {"shortest": 0, "longest": 0, "tolerance": 10.0},
            "repetition": weighed | {"order": 2},
            "functions": {},
        }
    )
    # Bags of images much alike, as `capjax data bags` makes them; a curriculum is a list of stages
    # END_EPOCH:SIZE or END_EPOCH:LEVEL:SIZE, or "published". `groups`: parts of a batch within
    # which bags are whole (0: one a process).
    config.bags = ConfigDict({"directory": "", "curriculum": (), "groups": 0})
    # What is watched (see `capjax.rl.alarms`). `action`: "warn", "stop" or "lower_rate".
    config.alarms = ConfigDict(
        {
            "judge_metric": "rd100_r1",
            "window": 3,
            "min_judge_gain": 0.0,
            "max_kl": 0.0,
            "max_length_ratio": 2.0,
            "max_repetition": 0.3,
            "min_distinct_ratio": 0.5,
            "action": "warn",
            "rate_factor": 0.5,
        }
    )
    config.optimizer.update(
        learning_rate=1e-5, weight_decay=0.0, b2=0.95, schedule="constant", grad_clip_norm=1.0
    )
    config.evaluate.every_steps = 100
    return config
