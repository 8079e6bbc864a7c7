"""What a run of reinforcement is made of, opened and checked from its config."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from capjax.commands import build
from capjax.commands.measures import Measures
from capjax.commands.program import build_mesh, check_counts
from capjax.commands.settings import from_dataclass_kwargs
from capjax.data.curriculum import PUBLISHED, BagOrder, open_bags, parse_curriculum
from capjax.data.sources import Source
from capjax.decoding.load import load
from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError, did_you_mean
from capjax.evaluation.features import params_digest
from capjax.models.captioner import Captioner
from capjax.objectives.policy_gradient import ALGORITHMS, PolicyGradient
from capjax.rl.alarms import Alarms
from capjax.rl.reward_terms import HostFunction, Rewards
from capjax.rl.step import Sampling, check_policy
from capjax.rl.towers import RewardTowers


class Parts(NamedTuple):
    """All that the config names. `config` is complete: with what the checkpoint decides."""

    config: ConfigDict
    mesh: Mesh
    base: LoadedModel  # the captioner to start from
    model: Captioner  # as it is trained
    policy: PolicyGradient
    sampling: Sampling
    rewards: Rewards
    alarms: Alarms
    reward_towers: LoadedModel | None  # on the mesh
    data: build.DataPlan
    source: Source
    splits: dict[str, tuple[str, Source]]
    measures: Measures
    order: BagOrder | None

    @property
    def reads_tokens(self) -> bool:
        """Whether the reward's towers read the captioner's ids as they are."""
        return (
            self.reward_towers is not None and self.reward_towers.tokenizer == self.base.tokenizer
        )

    def embedders(self) -> RewardTowers | None:
        """The reward's towers for the step; None without."""
        if self.reward_towers is None:
            return None
        ids: Any = ()
        if self.reads_tokens and self.config.rewards.prompt:
            length = self.reward_towers.embedder.config.text_length
            ids = self.reward_towers.tokenizer.encode(self.config.rewards.prompt, length)
        prompt = tuple(int(token) for token in np.asarray(ids) if token > 1)  # neither PAD nor end
        return RewardTowers(self.reward_towers.embedder, prompt, self.reads_tokens)


def open_parts(config: ConfigDict) -> Parts:
    """Opens and checks what the config names. Raises `UserError`."""
    if not config.warm_start.path:
        raise UserError(
            "warm_start.path is empty: name the captioner to start from with --checkpoint=DIR"
        )
    policy = build_policy(config)
    sampling = from_dataclass_kwargs(Sampling, config.sampling, "sampling")
    check_policy(policy, sampling)
    rewards = build_rewards(config)
    alarms = from_dataclass_kwargs(Alarms, config.alarms, "alarms")
    base = load(config.warm_start.path)
    model = trained_model(config, base)
    config = with_checkpoint(config, base)
    mesh = build_mesh(config)
    check_counts(config, mesh)
    source = build.build_source(config)
    if source is None:
        raise UserError("data.source=synthetic has no captions that a reward could read")
    measures = build.build_measures(config)
    towers = open_towers(config, rewards, mesh)
    check_judge(config, towers, measures.judge)
    return Parts(
        config=config,
        mesh=mesh,
        base=base,
        model=model,
        policy=policy,
        sampling=sampling,
        rewards=rewards,
        alarms=alarms,
        reward_towers=towers,
        data=build.build_data(config),
        source=source,
        splits=build.open_splits(config),
        measures=measures,
        order=build_bags(config, source, mesh),
    )


def build_policy(config: ConfigDict) -> PolicyGradient:
    """The section `policy`: its algorithm's choices and what is set beside. Raises `UserError`."""
    section = dict(config.policy)
    algorithm = section.pop("algorithm")
    if algorithm not in ALGORITHMS:
        raise UserError(
            f"policy.algorithm={algorithm!r}: choose one of {', '.join(ALGORITHMS)}"
            f"{did_you_mean(str(algorithm), ALGORITHMS)}"
        )
    given = {name: value for name, value in section.items() if value is not None}
    return from_dataclass_kwargs(PolicyGradient, ALGORITHMS[algorithm] | given, "policy")


def build_rewards(config: ConfigDict) -> Rewards:
    """The section `rewards`. Raises `UserError`."""
    section = config.rewards.to_dict()
    for name in ("towers", "prompt", "batch_size"):
        del section[name]
    functions = {
        name: {"file": term, "weight": 1.0} if isinstance(term, str) else term
        for name, term in section.pop("functions").items()
    }
    made = {
        name: from_dataclass_kwargs(HostFunction, term, f"rewards.functions.{name}")
        for name, term in functions.items()
    }
    known = {field.name for field in dataclasses.fields(Rewards)}
    if taken := sorted(known & made.keys()):
        raise UserError(f"rewards.functions.{taken[0]}: a reward has that name; choose another")
    return from_dataclass_kwargs(Rewards, section | {"functions": made}, "rewards")


def trained_model(config: ConfigDict, base: LoadedModel) -> Captioner:
    """The checkpoint's captioner, computing as `config.compute` says. Raises `UserError`."""
    if base.towers.captioner is None:
        raise UserError(
            f"warm_start.path={config.warm_start.path}: reinforcement needs a captioner; this "
            f"checkpoint holds {', '.join(base.towers.to_dict())}"
        )
    given = {name: value for name, value in config.compute.items() if value}
    return Captioner(dataclasses.replace(base.towers.captioner.config, **given))


def with_checkpoint(config: ConfigDict, base: LoadedModel) -> ConfigDict:
    """The config with the sections that the checkpoint decides, as other commands read them."""
    config = ConfigDict(config.to_dict())
    before = base.config.get("objective", {}).get("captioning", {})
    config.preprocessing = dataclasses.asdict(base.preprocessing)
    config.data.text_length = base.model.config.text_length
    config.objective = {
        "captioning": {
            "weight": 1.0,
            "parallel_fraction": 0.0,
            "image_dropout": before.get("image_dropout", 0.0),
        }
    }
    config.warm_start.update(include=("encoder", "decoder"), exclude=())
    return config.lock()


def open_towers(config: ConfigDict, rewards: Rewards, mesh: Mesh) -> LoadedModel | None:
    """The towers that rewards read, on the mesh; None where none does. Raises `UserError`."""
    if not rewards.needs_towers:
        return None
    if not config.rewards.towers:
        raise UserError(
            "rewards.towers is empty: name a checkpoint of contrastive towers with --towers=DIR, "
            f"which the rewards {', '.join(rewards.used)} need"
        )
    towers = load(config.rewards.towers)
    if towers.towers.embedder is None:
        raise UserError(
            f"rewards.towers={config.rewards.towers}: it has no contrastive towers; name a "
            "checkpoint of CLIP, SigLIP or CoCa"
        )
    return towers.on_mesh(mesh)


def check_judge(config: ConfigDict, towers: LoadedModel | None, judge: LoadedModel | None) -> None:
    """Raises `UserError` where the judge is the very reward."""
    if towers is None or judge is None:
        return
    if params_digest(towers.params) == params_digest(judge.params):
        raise UserError(
            f"evaluate.judge={config.evaluate.judge} has the weights of rewards.towers="
            f"{config.rewards.towers}: a reward that is learnt from judges nothing; name other "
            "towers"
        )


def build_bags(config: ConfigDict, source: Source, mesh: Mesh) -> BagOrder | None:
    """The order of bags of the section `bags`; None where no directory is named."""
    directory, entries = config.bags.directory, config.bags.curriculum
    if not directory:
        if entries:
            raise UserError(
                f"bags.curriculum={tuple(entries)}: name the bags in bags.directory (make them "
                "with `capjax data bags`)"
            )
        return None
    entries = (entries,) if isinstance(entries, str) else tuple(entries)
    curriculum = PUBLISHED if entries == ("published",) else parse_curriculum(entries)
    processes = len({device.process_index for device in mesh.devices.flat})
    return BagOrder(
        curriculum,
        open_bags(directory, curriculum, source),
        batch_size=config.batch_size,
        seed=config.seed,
        groups=config.bags.groups or processes,
    )
