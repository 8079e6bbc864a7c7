"""The rewards by name: what a caption earns for what, each a weight and a function of the device.

What the host makes for them comes in two ways. Arrays that depend on the images alone (their
embeddings, mined negatives, references as the towers read them) lie in the batch. What depends on
the captions (texts for towers with another tokenizer, rewards of the host) is `given`.

Letters beyond `capjax.dims`: J captions of an image, R references.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Array, Batch
from capjax.errors import UserError
from capjax.rewards.clip_score import DEFINITIONS, clip_score_reward, ref_clip_score_reward
from capjax.rewards.consensus_device import cider_d
from capjax.rewards.grammar import grammar_score
from capjax.rewards.grammar_tower import TowerTraining
from capjax.rewards.normalize import KINDS
from capjax.rewards.self_retrieval import FORMS, self_retrieval
from capjax.rewards.text_shape import length_penalty, repetition_penalty
from capjax.rl.step import Reward
from capjax.rl.towers import RewardTowers, as_texts

# Names of arrays.
TOWER_IMAGE = "tower_image"  # [B, D], in the batch: of length 1
TOWER_NEGATIVES = "tower_negatives"  # [B, M, D], in the batch
TOWER_REFERENCES = "tower_references"  # [B, R, T] ids, in the batch; all PAD where there is none
REFERENCES = "references"  # [B, R, L] of the captioner's ids, in the batch; likewise
TOWER_TOKENS = "tower_tokens"  # [B, J, T] ids, given
HOST = "host_"  # [B, J], given: a reward of the host


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"rewards.{name}={value!r}: choose {' or '.join(choices)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weighed:
    """`weight`: in the sum of rewards; 0 leaves it out. `normalize`: before it is weighed: "none",
    "batch" or "group" (see `capjax.rewards.normalize`)."""

    weight: float = 0.0
    normalize: str = "none"

    def __post_init__(self):
        if not math.isfinite(self.weight):
            raise UserError(f"rewards: weight={self.weight}: expected a finite number")
        if self.normalize not in KINDS:
            raise UserError(
                f"rewards: normalize={self.normalize!r}: choose one of {', '.join(KINDS)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfRetrieval(_Weighed):
    """The caption must pick its image (Dessì et al. 2023, Gaur et al. 2024).

    form: "log" (log-softmax) or "accuracy". among: "batch" or the image's "bag". scale: of the
    cosines; 0: the towers' own. num_negatives: the nearest images of the source, besides.
    """

    form: str = "log"
    among: str = "batch"
    scale: float = 0.0
    num_negatives: int = 0

    def __post_init__(self):
        super().__post_init__()
        _check_choice("self_retrieval.form", self.form, FORMS)
        _check_choice("self_retrieval.among", self.among, ("batch", "bag"))
        if self.scale < 0 or self.num_negatives < 0:
            raise UserError(
                f"rewards.self_retrieval: scale={self.scale}, num_negatives={self.num_negatives}: "
                "expected 0 or more"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipScore(_Weighed):
    """w max(cos, 0) of caption and image (Cho et al. 2022)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefClipScore(_Weighed):
    """With the nearest reference; definition "hessel" or "cho"."""

    definition: str = "hessel"

    def __post_init__(self):
        super().__post_init__()
        _check_choice("ref_clip_score.definition", self.definition, DEFINITIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CiderD(_Weighed):
    """Consensus with the references (Rennie et al. 2017), the end of the caption counted.

    on: "host", on words and exact, or "device", on the captioner's ids and hashed.
    """

    on: str = "host"

    def __post_init__(self):
        super().__post_init__()
        _check_choice("cider_d.on", self.on, ("host", "device"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar(_Weighed):
    """How surely a head takes the caption for one that nobody broke (Cho et al. 2022).

    head: a file of its weights, and of the towers' text side where that has learnt with it; "": one
    is trained on the captions of the source. train_tower: the text side learns with it, as `tower`
    says (see `capjax.rewards.grammar_tower`), and is what all rewards of these towers read.
    """

    head: str = ""
    train_tower: bool = False
    tower: TowerTraining = dataclasses.field(default_factory=TowerTraining)

    def __post_init__(self):
        super().__post_init__()
        if self.train_tower and not self.weight:
            raise UserError(
                "rewards.grammar.train_tower with rewards.grammar.weight=0: nothing would read its "
                "head; set a weight"
            )
        if self.train_tower and self.head:
            raise UserError(
                f"rewards.grammar.train_tower with rewards.grammar.head={self.head}: that file has "
                "been trained; leave one of the two out"
            )
        if self.head and not epath.Path(self.head).exists():
            raise UserError(f"rewards.grammar.head={self.head}: there is no such file")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length(_Weighed):
    """0 from `shortest` to `longest` tokens, the end included, beyond falling to -1."""

    shortest: int = 0
    longest: int = 0
    tolerance: float = 10.0

    def __post_init__(self):
        super().__post_init__()
        if self.weight and not 0 <= self.shortest <= self.longest > 0:
            raise UserError(
                f"rewards.length.shortest={self.shortest}, longest={self.longest}: set the range "
                "of tokens that is as good as any"
            )
        if not self.tolerance > 0:
            raise UserError(f"rewards.length.tolerance={self.tolerance}: expected more than 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repetition(_Weighed):
    """Minus the share of n-grams of `order` tokens that the caption has had before."""

    order: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.order < 1:
            raise UserError(f"rewards.repetition.order={self.order}: expected at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostFunction(_Weighed):
    """Any function of (images, captions, references): `file`, a Python file that defines
    `reward(images, captions, references)`."""

    file: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards:
    """All rewards of a run. Their sum, each normalised and then weighed, is what is learnt from."""

    self_retrieval: SelfRetrieval = SelfRetrieval()
    clip_score: ClipScore = ClipScore()
    ref_clip_score: RefClipScore = RefClipScore()
    cider_d: CiderD = CiderD()
    grammar: Grammar = Grammar()
    length: Length = Length()
    repetition: Repetition = Repetition()
    functions: Mapping[str, HostFunction] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.used:
            raise UserError(
                "rewards: every weight is 0; set one, such as rewards.self_retrieval.weight=1"
            )
        for name, term in self.functions.items():
            if not term.file:
                raise UserError(
                    f"rewards.functions.{name}.file is empty: name a Python file that defines "
                    "reward(images, captions, references)"
                )

    @property
    def used(self) -> dict[str, Any]:
        """Those whose weight is not 0, by name."""
        terms = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "functions"
        }
        terms |= {str(name): term for name, term in self.functions.items()}
        return {name: term for name, term in terms.items() if term.weight}

    @property
    def needs_towers(self) -> bool:
        """Whether one of them reads the embeddings of the reward's towers."""
        reading = ("self_retrieval", "clip_score", "ref_clip_score", "grammar")
        return any(name in self.used for name in reading)

    @property
    def on_host(self) -> tuple[str, ...]:
        """The names of those that the host computes."""
        named = [name for name in self.functions if name in self.used]
        return tuple(named + ["cider_d"] * ("cider_d" in self.used and self.cider_d.on == "host"))


class Towers(NamedTuple):
    """The towers of rewards as functions of (frozen, batch, tokens, given)."""

    read: RewardTowers

    def texts(self, tokens_BJL: Array, given: Batch) -> Array:
        """[B, J, T], ids as the towers read them."""
        texts_BJT = given.get(TOWER_TOKENS)
        if texts_BJT is not None:
            return texts_BJT
        return as_texts(tokens_BJL, self.read.embedder.config.text_length, self.read.prompt)

    def captions(self, frozen: Any, tokens_BJL: Array, given: Batch) -> Array:
        """[B, J, D]"""
        return self.read.embed(frozen["towers"], self.texts(tokens_BJL, given))

    def references(self, frozen: Any, batch: Batch) -> tuple[Array, Array]:
        """[B, R, D], and which of them there are, [B, R]."""
        texts_BRT = batch[TOWER_REFERENCES]
        return self.read.embed(frozen["towers"], texts_BRT), texts_BRT[:, :, 0] != PAD_ID

    def scale(self, frozen: Any) -> Array:
        """What the towers multiply cosines by."""
        return self.read.embedder.logit_scale_and_bias(frozen["towers"])[0]


def build_rewards(
    rewards: Rewards, towers: RewardTowers | None, device_functions: Mapping[str, Any] | None = None
) -> list[Reward]:
    """The terms in use as functions of the device.

    `device_functions`: `compute` of those that are built elsewhere, by name. Raises `UserError`
    where one needs towers and there are none.
    """
    if rewards.needs_towers and towers is None:
        raise UserError(
            "rewards.towers is empty: name a checkpoint of contrastive towers, which the rewards "
            f"{', '.join(rewards.used)} read"
        )
    made = []
    for name, term in rewards.used.items():
        compute = (device_functions or {}).get(name) or _compute(name, term, rewards, towers)
        made.append(Reward(name, term.weight, compute, term.normalize))
    return made


def _compute(name: str, term: Any, rewards: Rewards, towers: RewardTowers | None):
    if name in rewards.on_host:
        return lambda frozen, batch, tokens_BJL, given: given[HOST + name]
    if name == "cider_d":
        return lambda frozen, batch, tokens_BJL, given: cider_d(
            tokens_BJL, batch[REFERENCES], frozen["ngrams"]
        )
    if name == "length":
        return lambda frozen, batch, tokens_BJL, given: length_penalty(
            tokens_BJL, term.shortest, term.longest, term.tolerance
        )
    if name == "repetition":
        return lambda frozen, batch, tokens_BJL, given: repetition_penalty(tokens_BJL, term.order)
    assert towers is not None
    read = Towers(towers)

    def self_retrieving(frozen, batch, tokens_BJL, given):
        return self_retrieval(
            read.captions(frozen, tokens_BJL, given),
            batch[TOWER_IMAGE],
            term.scale or read.scale(frozen),
            form=term.form,
            bag_B=batch["bag"] if term.among == "bag" else None,
            mask_B=batch["mask"],
            index_B=batch["index"],
            negative_BMD=batch.get(TOWER_NEGATIVES),
        )

    def clip_scored(frozen, batch, tokens_BJL, given):
        return clip_score_reward(read.captions(frozen, tokens_BJL, given), batch[TOWER_IMAGE])

    def ref_clip_scored(frozen, batch, tokens_BJL, given):
        reference_BRD, is_there_BR = read.references(frozen, batch)
        return ref_clip_score_reward(
            read.captions(frozen, tokens_BJL, given),
            batch[TOWER_IMAGE],
            reference_BRD,
            is_there_BR,
            definition=term.definition,
        )

    def grammar_scored(frozen, batch, tokens_BJL, given):
        feature_BJD = read.read.features(frozen["towers"], read.texts(tokens_BJL, given))
        return grammar_score(frozen["grammar"], feature_BJD)

    return {
        "grammar": grammar_scored,
        "self_retrieval": self_retrieving,
        "clip_score": clip_scored,
        "ref_clip_score": ref_clip_scored,
    }[name]
