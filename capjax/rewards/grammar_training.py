"""Training of the grammar head: captions as they are against the same captions broken.

Cho et al. 2022, "Fine-grained Image Captioning with CLIP Reward". Here the text tower stays as it
is; in `capjax.rewards.grammar_tower` it learns along with the head, as in the paper.

Letters: N captions, M = copies * N broken ones, D width of the tower's feature.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from capjax.dims import Array, Float, Params
from capjax.errors import UserError
from capjax.rewards.corruption import corrupt
from capjax.rewards.grammar import grammar_logits, grammar_score, init_grammar_head


@dataclasses.dataclass(frozen=True)
class GrammarTraining:
    """How the head learns.

    Attributes:
      steps, batch_size, learning_rate: of Adam, the rate falling to 0 as a cosine; a batch is so
        many captions and as many broken ones.
      hidden_width: 0 for the width of the feature.
      copies: how often each caption is broken, each time differently.
      held_out: the share of the captions that the head's accuracy is measured on instead.
      seed: of all that is drawn.
    """

    steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 1e-3
    hidden_width: int = 0
    copies: int = 4
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "copies"):
            if getattr(self, name) < 1:
                raise UserError(f"grammar.{name}={getattr(self, name)}: expected 1 or more")
        if not self.learning_rate > 0:
            raise UserError(f"grammar.learning_rate={self.learning_rate}: expected more than 0")
        if not 0 < self.held_out < 1:
            raise UserError(f"grammar.held_out={self.held_out}: expected a share between 0 and 1")


def train_grammar_head(
    whole_ND: np.ndarray, broken_MD: np.ndarray, training: GrammarTraining = GrammarTraining()
) -> Params:
    """A head that tells the features of whole captions from those of broken ones.

    One program on this process's default device; the same features give the same head.
    """
    features = jnp.asarray(whole_ND, jnp.float32), jnp.asarray(broken_MD, jnp.float32)
    return _train(training, *features)


class Corpus(NamedTuple):
    """Captions to learn grammar from, each once, in a random order.

    whole: the first `num_held_out` of them are not learnt from. broken: of each copy, all of them,
    broken. vocabulary: their words, with which they are broken.
    """

    whole: list[str]
    broken: list[list[str]]
    num_held_out: int
    vocabulary: list[str]


def grammar_corpus(texts: Sequence[str], training: GrammarTraining = GrammarTraining()) -> Corpus:
    """The different captions among `texts`; the same whatever their order.

    Raises `UserError` where there are fewer than two.
    """
    distinct = sorted({text.strip() for text in texts} - {""})
    num_held_out = max(1, round(training.held_out * len(distinct)))
    if len(distinct) <= num_held_out:
        raise UserError(
            f"{len(distinct)} different captions to learn grammar from, {num_held_out} of them "
            "held out: expected more"
        )
    order = np.random.default_rng(training.seed).permutation(len(distinct))
    vocabulary = sorted({word for text in distinct for word in text.split()})
    broken = [
        [corrupt(distinct[place], vocabulary, (training.seed, copy, int(place))) for place in order]
        for copy in range(training.copies)
    ]
    return Corpus([distinct[place] for place in order], broken, num_held_out, vocabulary)


def fit_grammar_head(
    text_features: Callable[[Sequence[str]], np.ndarray],
    texts: Sequence[str],
    training: GrammarTraining = GrammarTraining(),
) -> tuple[Params, dict[str, float]]:
    """A head for captions like `texts`, and how well it does on those it has not learnt from.

    Args:
      text_features: texts -> float32 [N, D], such as `LoadedModel.text_features`; behind the same
        prompt, if there is one, as the reward reads captions.
      texts: good captions; each counts once. Their words are what others are broken with.

    Returns (params, what `held_out_metrics` does). Raises `UserError` where there are fewer than
    two captions.
    """
    corpus = grammar_corpus(texts, training)
    params = fit_corpus(text_features, corpus, training)
    return params, held_out_metrics(params, text_features, corpus)


def fit_corpus(
    text_features: Callable[[Sequence[str]], np.ndarray],
    corpus: Corpus,
    training: GrammarTraining = GrammarTraining(),
) -> Params:
    """A head that has learnt from the captions of `corpus` that are not held out."""
    learnt = slice(corpus.num_held_out, None)
    return train_grammar_head(
        text_features(corpus.whole[learnt]),
        text_features([text for copy in corpus.broken for text in copy[learnt]]),
        training,
    )


def held_out_metrics(
    params: Params, text_features: Callable[[Sequence[str]], np.ndarray], corpus: Corpus
) -> dict[str, float]:
    """How well a head does on the captions held out.

    `grammar_accuracy`: the share told right, of whole and broken ones alike; `grammar_whole` and
    `grammar_broken`: their mean scores.
    """
    whole_N, broken_N = (
        np.asarray(grammar_score(params, jnp.asarray(text_features(texts[: corpus.num_held_out]))))
        for texts in (corpus.whole, corpus.broken[0])
    )
    return {
        "grammar_accuracy": float(((whole_N > 0.5).mean() + (broken_N < 0.5).mean()) / 2),
        "grammar_whole": float(whole_N.mean()),
        "grammar_broken": float(broken_N.mean()),
    }


def grammar_loss(
    params: Params, whole_BD: Float[Array, "B D"], broken_BD: Float[Array, "B D"]
) -> Float[Array, ""]:
    """The cross-entropy of whole against broken, in nats, mean over both."""
    logits = [grammar_logits(params, feature_BD) for feature_BD in (whole_BD, broken_BD)]
    gaps = [logits_B2[:, 1] - logits_B2[:, 0] for logits_B2 in logits]
    return jnp.mean(jax.nn.softplus(-gaps[0])) / 2 + jnp.mean(jax.nn.softplus(gaps[1])) / 2


@functools.partial(jax.jit, static_argnums=0)
def _train(training: GrammarTraining, whole_ND: Array, broken_MD: Array) -> Params:
    schedule = optax.cosine_decay_schedule(training.learning_rate, training.steps)
    optimizer = optax.adam(schedule)
    init_key, key = jax.random.split(jax.random.key(training.seed))
    params = init_grammar_head(init_key, whole_ND.shape[1], training.hidden_width)

    def step(carry, number):
        params, state = carry
        keys = jax.random.split(jax.random.fold_in(key, number))
        drawn = [
            feature_ND[jax.random.randint(one, (training.batch_size,), 0, len(feature_ND))]
            for one, feature_ND in zip(keys, (whole_ND, broken_MD), strict=True)
        ]
        updates, state = optimizer.update(jax.grad(grammar_loss)(params, *drawn), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, optimizer.init(params))
    return jax.lax.scan(step, carry, jnp.arange(training.steps))[0][0]
