"""Reinforcement on the embedded corpus: captions that single out their image, or agree with others.

capjax reinforce --config=emoji_reinforce --checkpoint=runs/vague --towers=runs/siglip \
    --workdir=runs/reinforced
capjax reinforce --config=emoji_reinforce:cider --checkpoint=runs/vague --workdir=runs/cider

self_retrieval  a frozen pair of towers must pick the image of each caption among the batch's
cider           CIDEr-D with the reference captions, on the host
both            the sum of the two, each normalised over the batch

A judge that is not the reward (evaluate.judge=runs/clip) belongs to every such run.
"""

from ml_collections import ConfigDict

from capjax.commands.reinforce_config import reinforce_config

REWARDS = {
    "self_retrieval": {"self_retrieval": 1.0},
    "cider": {"cider_d": 1.0},
    "both": {"self_retrieval": 1.0, "cider_d": 1.0},
}


def get_config(arg: str = "self_retrieval") -> ConfigDict:
    """The config for one of `REWARDS`. Raises `ValueError` for a name that is none."""
    if arg not in REWARDS:
        raise ValueError(f"no rewards {arg!r}; name one of {', '.join(REWARDS)}")
    config = reinforce_config()
    config.name = f"emoji_reinforce_{arg}"
    config.batch_size = 60
    config.total_steps = 400

    config.data.source = "emoji:train?vague=0.7"
    config.data.styles = ("fluent", "noto")
    config.captions.sources = ("vague",)
    for name, weight in REWARDS[arg].items():
        config.rewards[name].weight = weight
        config.rewards[name].normalize = "batch" if arg == "both" else "none"
    config.rewards.grammar.tower.update(steps=300, batch_size=128, learning_rate=1e-3)
    config.policy.update(algorithm="rloo", kl_weight=0.02, whiten=True)
    config.optimizer.update(learning_rate=3e-4, schedule="constant", warmup_steps=20)

    config.checkpoint.every_steps = 200
    config.evaluate.every_steps = 50
    config.evaluate.max_examples = 128
    config.evaluate.references = ("tts",)
    config.evaluate.lexicon = "emoji"
    config.evaluate.judge_prompt = ""
    config.evaluate.splits = ConfigDict({"composition": "emoji:composition", "val": "emoji:val"})
    return config
