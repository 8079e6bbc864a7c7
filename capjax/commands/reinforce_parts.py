"""What a run of reinforcement is made of, opened and checked from its config."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from capjax.checkpoint.digest import params_digest
from capjax.commands import build
from capjax.commands.measures import Measures
from capjax.commands.program import build_mesh, check_counts
from capjax.commands.reinforce_data import references_of
from capjax.commands.reinforce_grammar import BEGINNING, check_grammar_beginning
from capjax.commands.reinforce_trial import Prefix, open_prefix
from capjax.commands.settings import from_dataclass_kwargs
from capjax.data.captions import clean_text
from capjax.data.curriculum import PUBLISHED, BagOrder, open_bags, parse_curriculum
from capjax.data.sources import Source
from capjax.decoding.load import load
from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError, did_you_mean
from capjax.mesh import check_batch_size
from capjax.models.captioner import Captioner
from capjax.objectives.policy_gradient import ALGORITHMS, PolicyGradient
from capjax.rl.alarms import Alarms
from capjax.rl.reward_terms import HostFunction, Rewards
from capjax.rl.step import Sampling, check_policy
from capjax.rl.towers import RewardTowers
from capjax.training.workdir import write_atomic

BEGINNINGS = "started_from.json"


class Parts(NamedTuple):
    """All that the config names. `config` is complete: with what the checkpoint decides."""

    config: ConfigDict
    mesh: Mesh
    base: LoadedModel  # the captioner to start from
    model: Captioner  # as it is trained
    policy: PolicyGradient
    sampling: Sampling  # its `max_length` is a number of tokens
    prefix: Prefix
    rewards: Rewards
    alarms: Alarms
    reward_towers: LoadedModel | None  # on the mesh
    data: build.DataPlan
    source: Source
    splits: dict[str, tuple[str, Source]]
    measures: Measures
    order: BagOrder | None
    references: Callable[[], list[list[str]]]  # of every example, read once

    @property
    def reads_tokens(self) -> bool:
        """Whether the reward's towers read the captioner's ids as they are."""
        towers, tokenizer = self.reward_towers, self.base.tokenizer
        return towers is not None and towers.tokenizer == tokenizer and self.prefix.is_apart

    @property
    def has_host(self) -> bool:
        """Whether rewards need the captions on the host."""
        return bool(self.rewards.on_host) or (
            self.reward_towers is not None and not self.reads_tokens
        )

    def embedders(self) -> RewardTowers | None:
        """The reward's towers for the step; None without."""
        if self.reward_towers is None:
            return None
        ids: Any = ()
        if self.reads_tokens and self.config.rewards.prompt:
            length = self.reward_towers.embedder.config.text_length
            lower = self.reward_towers.config.get("captions", {}).get("lower", False)
            text = clean_text(self.config.rewards.prompt, lower)
            ids = self.reward_towers.tokenizer.encode(text, length)
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
    check_together(config, policy, sampling, rewards, alarms)
    base = load(config.warm_start.path)
    model = trained_model(config, base)
    mesh = build_mesh(config)
    config = with_checkpoint(config, base, mesh)
    check_counts(config, mesh)
    check_batch_size(config.rewards.batch_size, mesh, "rewards.batch_size")
    source = build.build_source(config)
    if source is None:
        raise UserError("data.source=synthetic has no captions that a reward could read")
    data = build.build_data(config)
    prefix = open_prefix(config, base, sampling, source, data.captions)
    measures = build.build_measures(config)
    towers = open_towers(config, rewards, mesh)
    check_judge(config, towers, measures.judge)
    if rewards.self_retrieval.num_negatives >= len(source):
        raise UserError(
            f"rewards.self_retrieval.num_negatives={rewards.self_retrieval.num_negatives}: "
            f"expected fewer than the {len(source)} images of data.source"
        )
    parts = Parts(
        config=config,
        mesh=mesh,
        base=base,
        model=model,
        policy=policy,
        sampling=dataclasses.replace(
            sampling, max_length=sampling.max_length or data.text_length - len(prefix.ids)
        ),
        prefix=prefix,
        rewards=rewards,
        alarms=alarms,
        reward_towers=towers,
        data=data,
        source=source,
        splits=build.open_splits(config),
        measures=measures,
        order=build_bags(config, source),
        references=functools.cache(lambda: references_of(source, data.captions)),
    )
    return parts._replace(policy=clipped(policy, config)) if parts.has_host else parts


def check_together(
    config: ConfigDict,
    policy: PolicyGradient,
    sampling: Sampling,
    rewards: Rewards,
    alarms: Alarms,
) -> None:
    """Raises `UserError` for sections that do not go together."""
    by_group = [name for name, term in rewards.used.items() if term.normalize == "group"]
    if by_group and sampling.num_samples == 1:
        raise UserError(
            f"rewards.{by_group[0]}.normalize='group' with sampling.num_samples=1 leaves nothing; "
            "sample more captions an image, or normalise over the batch"
        )
    if rewards.self_retrieval.among == "bag" and not config.bags.directory:
        raise UserError(
            "rewards.self_retrieval.among='bag' without bags.directory: name the bags that "
            "`capjax data bags` made, or take among='batch'"
        )
    if alarms.max_kl and not policy.kl_weight:
        raise UserError(
            f"alarms.max_kl={alarms.max_kl} watches a divergence that nothing computes; set "
            "policy.kl_weight, or alarms.max_kl=0"
        )
    if alarms.action == "lower_rate" and config.optimizer.ema_decay:
        raise UserError(
            f"alarms.action='lower_rate' with optimizer.ema_decay={config.optimizer.ema_decay}: "
            "the average would follow the full rate; set one of them otherwise"
        )
    if config.bags.directory and (config.total_epochs or config.total_examples):
        raise UserError(
            "bags.directory with total_epochs or total_examples: the run ends with the curriculum; "
            "leave them out, or set total_steps"
        )


def clipped(policy: PolicyGradient, config: ConfigDict) -> PolicyGradient:
    """The policy for captions that are one update old: clipped, unless the config says not."""
    is_said = config.policy.clip_low is not None or config.policy.clip_high is not None
    if policy.is_clipped or is_said or policy.preference_weight:
        return policy
    return dataclasses.replace(policy, clip_low=0.2, clip_high=0.2)


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
    known = {field.name for field in dataclasses.fields(Rewards)} | {"std"}  # logged already
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


def with_checkpoint(config: ConfigDict, base: LoadedModel, mesh: Mesh) -> ConfigDict:
    """The config with the sections that the checkpoint decides, as other commands read them."""
    config = ConfigDict(config.to_dict())
    processes = len({device.process_index for device in mesh.devices.flat})
    config.bags.groups = config.bags.groups or processes  # a resume keeps it
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


def build_bags(config: ConfigDict, source: Source) -> BagOrder | None:
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
    return BagOrder(
        curriculum,
        open_bags(directory, curriculum, source),
        batch_size=config.batch_size,
        seed=config.seed,
        groups=config.bags.groups,
    )


def beginnings(parts: Parts) -> dict[str, dict[str, Any]]:
    """What the run started from: the step and the digest of each checkpoint."""
    models = {"warm_start.path": parts.base, "rewards.towers": parts.reward_towers}
    return {
        name: {"step": model.step, "digest": params_digest(model.params)}
        for name, model in models.items()
        if model is not None
    }


def check_beginnings(parts: Parts, root: epath.Path) -> None:
    """Raises `UserError` where a run that goes on would find other checkpoints than it began with.

    A workdir among them that trained on has a newer step.
    """
    path = root / BEGINNINGS
    if not path.exists():
        return
    now = beginnings(parts)
    for name, then in json.loads(path.read_text()).items():
        if name == BEGINNING:
            check_grammar_beginning(parts.rewards.grammar, root, then)
        elif now.get(name) != then:
            section, _, field = name.partition(".")
            raise UserError(
                f"{name}={parts.config[section][field]} is not what this run began with (step "
                f"{then['step']}): put that checkpoint back, or choose another --workdir"
            )


def write_beginnings(parts: Parts, root: epath.Path) -> None:
    """Keeps them in the workdir, once; called by every process, as their arrays are split."""
    text = json.dumps(beginnings(parts), indent=2) + "\n"
    if jax.process_index() == 0 and not (root / BEGINNINGS).exists():
        write_atomic(root / BEGINNINGS, text)
