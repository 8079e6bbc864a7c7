"""The text tower learns grammar along with the head, and does not forget its images.

Cho et al. 2022, "Fine-grained Image Captioning with CLIP Reward": the towers' own contrastive loss
between captions and their images, and the cross-entropy of those captions against the same broken.
All that images go through stays as it is, so their embeddings are constants.

Letters: N images, D width of the common space, B images of a batch and their captions, L tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from capjax.checkpoint.digest import params_digest
from capjax.decoding.loaded_model import LoadedModel
from capjax.dims import Array, Float, Int, Params
from capjax.errors import UserError
from capjax.mesh import place_tree
from capjax.models.coca import CoCa
from capjax.models.two_towers import TwoTowers
from capjax.objectives.contrastive import ContrastiveObjective, contrastive_loss
from capjax.rewards.corruption import corrupt
from capjax.rewards.grammar import TOWER, read_archive, write_archive
from capjax.rewards.grammar_training import (
    Corpus,
    GrammarTraining,
    fit_corpus,
    grammar_corpus,
    grammar_loss,
    held_out_metrics,
)
from capjax.training.patterns import by_name, matching, nested

NO_MESH = Mesh(np.empty((), object), ())
HEAD_TRAINING = GrammarTraining()
TEXT = "text/"  # in an archive, before the name of a parameter


@dataclasses.dataclass(frozen=True)
class TowerTraining:
    """How the text tower and the head learn together.

    Attributes:
      steps, batch_size, learning_rate: of Adam, the rate rising over the first tenth and then
        falling to 0 as a cosine; a batch is so many images, of each one caption, whole and broken.
        The rate is for towers as large as CLIP's; small ones take more.
      grammar_weight: of the cross-entropy of whole against broken beside the contrastive loss.
    """

    steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 1e-5
    grammar_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 2)):
            value = getattr(self, name)
            if value < least:
                raise UserError(f"grammar.tower.{name}={value}: expected {least} or more")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(
                f"grammar.tower.learning_rate={self.learning_rate}: expected more than 0"
            )
        if not 0 <= self.grammar_weight < math.inf:
            raise UserError(
                f"grammar.tower.grammar_weight={self.grammar_weight}: expected 0 or more"
            )


class GrammarTower(NamedTuple):
    """Towers whose text side has learnt grammar, the head that reads it, and how well they do.

    `before` is of the towers as they came, with a head that was trained on them; see
    `fit_grammar_tower`.
    """

    towers: LoadedModel
    head: Params
    before: dict[str, float]
    after: dict[str, float]


class _Pairs(NamedTuple):
    """Rows of the images to learn from with their captions; those held out, of each the first."""

    rows: np.ndarray
    captions: list[list[str]]
    held_out_rows: np.ndarray
    held_out_captions: list[str]


def grammar_tower_loss(
    embedder: TwoTowers | CoCa,
    objective: ContrastiveObjective,
    params: Params,
    head: Params,
    image_BD: Float[Array, "B D"],
    whole_BL: Int[Array, "B L"],
    broken_BL: Int[Array, "B L"],
    grammar_weight: float | Float[Array, ""] = 1.0,
) -> Float[Array, ""]:
    """The contrastive loss of images and whole captions, and the weighed `grammar_loss`, in nats.

    `image_BD` are embeddings of length 1, captions ids as the towers read them; the weight of the
    objective is left out.
    """
    feature_TD = embedder.text_feature(params, jnp.concatenate([whole_BL, broken_BL]))
    whole_BD, broken_BD = jnp.split(feature_TD, 2)
    text_BKD = embedder.project_text(params, whole_BD)[:, None]
    scale, bias = embedder.logit_scale_and_bias(params)
    loss, _ = contrastive_loss(objective, image_BD, text_BKD, scale, bias)
    features = whole_BD.astype(jnp.float32), broken_BD.astype(jnp.float32)
    return loss + grammar_weight * grammar_loss(head, *features)


def fit_grammar_tower(
    towers: LoadedModel,
    captions: Sequence[Sequence[str]],
    image_ND: np.ndarray,
    training: TowerTraining = TowerTraining(),
    head_training: GrammarTraining = HEAD_TRAINING,
    *,
    prompt: str = "",
) -> GrammarTower:
    """The towers with a text side that tells whole captions from broken ones, and the head.

    First a head is trained on the towers as they are, then both learn together. One program on
    this process's default device; the same input gives the same arrays.

    Args:
      captions: the good captions of each image; `image_ND`: its embedding by these towers, of
        length 1. Images without a caption, or of zeros (those that cannot be read), are left out.
      prompt: what the reward's towers read before each caption.

    The metrics are of the captions held out, which `fit_grammar_head` would hold out too: what it
    measures, and `text_to_image` and `image_to_text`, how often the nearest is the right one among
    the images of which they are the first caption, one of each caption. Images of which the first
    caption is held out are not learnt from. Raises `UserError` where there are fewer than two
    captions or images to learn from, and where the training diverges.
    """
    if len(captions) != len(image_ND):
        raise UserError(f"captions of {len(captions)} images, embeddings of {len(image_ND)}")
    with jax.set_mesh(NO_MESH):
        text, rest = _sides(towers)
        local = dataclasses.replace(towers, params=nested(rest | text), mesh=None)
        texts = [[text.strip() for text in own if text.strip()] for own in captions]
        texts = [own if row_D.any() else [] for own, row_D in zip(texts, image_ND, strict=True)]
        corpus = grammar_corpus([text for own in texts for text in own], head_training)
        pairs = _pairs(texts, corpus)
        objective = own_objective(local)
        head = fit_corpus(_reader(local, prompt), corpus, head_training)
        before = _measure(local, head, objective, corpus, pairs, image_ND, prompt)

        learnt = {"text": text, "head": jax.tree.map(jnp.asarray, head)}
        state = jax.jit(lambda learnt: _optimizer(training).init(learnt))(learnt)
        for step in range(training.steps):
            key = head_training.seed, step
            batch = _batch(local, pairs, corpus, image_ND, training.batch_size, key, prompt)
            # A copy for the first step, which donates it: the towers' own arrays stay.
            start = learnt if step else jax.tree.map(jnp.copy, learnt)
            learnt, state = _step(local.embedder, objective, training, start, state, rest, batch)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(learnt))):
            raise UserError(
                f"grammar.tower.learning_rate={training.learning_rate}: the training of the text "
                "tower diverged; lower it"
            )
        trained = dataclasses.replace(local, params=nested(rest | learnt["text"]))
        after = _measure(trained, learnt["head"], objective, corpus, pairs, image_ND, prompt)
    return GrammarTower(with_text(towers, learnt["text"]), learnt["head"], before, after)


def own_objective(towers: LoadedModel) -> ContrastiveObjective:
    """The contrastive loss that the towers were trained with; of converted ones its kind alone."""
    sections = towers.config.get("objective", {})
    if towers.towers.coca is not None:
        limit = sections.get("coca", {}).get("max_logit_scale", 0.0)
        return ContrastiveObjective(kind="softmax", max_logit_scale=limit)
    section = sections.get("contrastive", {})
    if section.get("weight"):
        return ContrastiveObjective(**section)
    # Only the sigmoid's logits have a bias.
    has_bias = "contrastive/logit_bias" in by_name(towers.params)
    return ContrastiveObjective(kind="sigmoid" if has_bias else "softmax")


def text_arrays(towers: LoadedModel) -> dict[str, Array]:
    """The arrays by name that `fit_grammar_tower` trains."""
    leaves = by_name(towers.params)
    names = matching(towers.embedder.text_side, leaves, "text_side")
    return {name: leaves[name] for name in sorted(names)}


def with_text(towers: LoadedModel, text: Mapping[str, Any]) -> LoadedModel:
    """The towers with the arrays of `text_arrays` replaced, laid out as theirs are."""
    if towers.mesh is not None:
        specs = by_name(towers.towers.param_specs())
        text = place_tree(towers.mesh, dict(text), {name: specs[name] for name in text})
    return dataclasses.replace(towers, params=nested(by_name(towers.params) | dict(text)))


def write_grammar_tower(path: str, towers: LoadedModel, head: Params) -> None:
    """The text side and the head as a NumPy archive; a whole file, or the old one."""
    text = {TEXT + name: x for name, x in text_arrays(towers).items()}
    write_archive(path, dict(head) | text | {TOWER: np.array(_digest(towers))})


def read_grammar_tower(path: str, towers: LoadedModel) -> tuple[LoadedModel, Params]:
    """`towers` with the text side that `write_grammar_tower` wrote, and the head, in NumPy.

    Raises `UserError` where the file is none, or of towers with another image side.
    """
    archive = read_archive(path)
    text = {name.removeprefix(TEXT): x for name, x in archive.items() if name.startswith(TEXT)}
    here = {name: x.shape for name, x in text_arrays(towers).items()}
    if TOWER not in archive or here != {name: x.shape for name, x in text.items()}:
        raise UserError(f"{path!r} holds no text tower of the sizes of these towers")
    if str(archive[TOWER]) != _digest(towers):
        raise UserError(
            f"{path!r} was trained with other towers; give those, or train it anew "
            "(capjax.rewards.grammar_tower.fit_grammar_tower)"
        )
    return with_text(towers, text), {name: archive[name] for name in ("hidden", "output")}


def _digest(towers: LoadedModel) -> str:
    """Of all that the training leaves as it is."""
    text = text_arrays(towers)
    rest = {name: x for name, x in by_name(towers.params).items() if name not in text}
    return params_digest(jax.tree.map(jnp.asarray, rest))


def _sides(towers: LoadedModel) -> tuple[dict[str, Array], dict[str, np.ndarray]]:
    """(what learns, float32 on the default device; all else, on the host), by name."""
    text = text_arrays(towers)
    rest = {name: x for name, x in by_name(towers.params).items() if name not in text}
    return {k: jnp.asarray(np.asarray(x), jnp.float32) for k, x in text.items()}, jax.device_get(
        rest
    )


def _pairs(texts: Sequence[Sequence[str]], corpus: Corpus) -> _Pairs:
    """Raises `UserError` where there are fewer than two images to learn from."""
    held_out = set(corpus.whole[: corpus.num_held_out])
    rows, captions, first_of = [], [], {}
    for row, own in enumerate(texts):
        if own and own[0] in held_out:
            first_of.setdefault(own[0], row)
        elif left := [text for text in own if text not in held_out]:
            rows.append(row)
            captions.append(left)
    if len(rows) < 2:
        raise UserError(
            f"{len(rows)} images with captions for a text tower to learn from: expected more"
        )
    return _Pairs(np.array(rows), captions, np.array([*first_of.values()], int), [*first_of])


def _batch(
    towers: LoadedModel,
    pairs: _Pairs,
    corpus: Corpus,
    image_ND: np.ndarray,
    batch_size: int,
    key: tuple[int, int],
    prompt: str,
) -> dict[str, np.ndarray]:
    """Different images of the key's drawing, of each a caption, whole and broken."""
    rng = np.random.default_rng(key)
    drawn = rng.choice(len(pairs.rows), min(batch_size, len(pairs.rows)), replace=False)
    own = [pairs.captions[place] for place in drawn]
    whole = [texts[rng.integers(len(texts))] for texts in own]
    broken = [corrupt(text, corpus.vocabulary, (*key, row)) for row, text in enumerate(whole)]
    return {
        "image_BD": image_ND[pairs.rows[drawn]].astype(np.float32),
        "whole_BL": towers.text_tokens([prompt + text for text in whole]),
        "broken_BL": towers.text_tokens([prompt + text for text in broken]),
    }


def _reader(towers: LoadedModel, prompt: str) -> Callable[[Sequence[str]], np.ndarray]:
    return lambda texts: towers.text_features([prompt + text for text in texts], 256)


def _measure(
    towers: LoadedModel,
    head: Params,
    objective: ContrastiveObjective,
    corpus: Corpus,
    pairs: _Pairs,
    image_ND: np.ndarray,
    prompt: str,
) -> dict[str, float]:
    """What `fit_grammar_tower` reports; of retrieval nothing where there are less than two."""
    found = held_out_metrics(head, _reader(towers, prompt), corpus)
    if len(pairs.held_out_rows) < 2:
        return found
    text_ND = towers.embed_texts([prompt + text for text in pairs.held_out_captions], 256)
    image_HD = jnp.asarray(image_ND[pairs.held_out_rows], jnp.float32)
    # The scale and the bias change no order.
    _, ranks = contrastive_loss(
        objective, image_HD, jnp.asarray(text_ND)[:, None], jnp.ones(()), jnp.zeros(())
    )
    names = ("text_to_image", "image_to_text")
    return found | {name: float(ranks[f"{name}_accuracy"]) for name in names}


def _optimizer(training: TowerTraining) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, training.learning_rate, training.steps // 10, training.steps
    )
    return optax.adam(rate)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _step(
    embedder: TwoTowers | CoCa,
    objective: ContrastiveObjective,
    training: TowerTraining,
    learnt: Params,
    state: Any,
    rest: Params,
    batch: dict[str, Array],
) -> Any:
    """What is learnt and the optimizer's state, after one more step."""

    def loss(learnt):
        params, weight = nested(rest | learnt["text"]), training.grammar_weight
        head = learnt["head"]
        return grammar_tower_loss(embedder, objective, params, head, **batch, grammar_weight=weight)

    updates, state = _optimizer(training).update(jax.grad(loss)(learnt), state, learnt)
    return optax.apply_updates(learnt, updates), state
