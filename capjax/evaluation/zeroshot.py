"""Classification without training examples: by what the classes are called.

Two towers compare an image with the mean embedding of a class's texts (Radford et al. 2021); a
captioner asks how probable those texts are as the image's caption (Tschannen et al. 2023, "Image
Captioners Are Scalable Vision Learners Too"). Letters: N images, T texts, C classes, R texts of the
class that has most.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from capjax.data.images import ImagePreprocessing
from capjax.data.sources import Source
from capjax.decoding.classify import class_texts, score_tree
from capjax.decoding.score import total
from capjax.decoding.token_tree import TokenTree, build_tree
from capjax.dims import Array, Float, Int, Params
from capjax.errors import UserError
from capjax.evaluation.every_row import ImageRows, map_images, map_rows
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa
from capjax.models.two_towers import TwoTowers


class ClassTexts(NamedTuple):
    """Texts, and the class of each; those of a class follow one another, as the classes do."""

    texts: tuple[str, ...]
    class_T: Int[np.ndarray, " T"]


def prompts(
    class_names: Sequence[str | Sequence[str]], templates: Sequence[str] = ("{}",)
) -> ClassTexts:
    """Every name of every class in the place of "{}" in every template; equal texts count once.

    Raises `UserError` for a template without "{}", and where there is no class, name or template.
    """
    found, classes = [], []
    for number, names in enumerate(class_names):
        names = (names,) if isinstance(names, str) else tuple(names)
        texts = dict.fromkeys(class_texts(names, templates))
        found += texts
        classes += [number] * len(texts)
    if not found:
        raise UserError("class_names is empty: expected at least one class")
    return ClassTexts(tuple(found), np.array(classes, np.int32))


def class_embeddings(
    towers: TwoTowers | CoCa,
    params: Params,
    tokens_TL: Int[np.ndarray, "T L"],
    class_T: Int[np.ndarray, " T"],
    *,
    mesh: Mesh,
) -> Float[np.ndarray, "C D"]:
    """Of length 1: the mean of the embeddings, each of length 1, of the class's texts."""
    embedded_TD = map_rows(
        lambda rows: _embed(towers, params, rows["tokens"]), {"tokens": tokens_TL}, mesh=mesh
    )
    sums_CD = np.zeros((class_T.max() + 1, embedded_TD.shape[1]), np.float32)
    np.add.at(sums_CD, class_T, embedded_TD)
    return sums_CD / (np.linalg.norm(sums_CD, axis=1, keepdims=True) + 1e-8)


def likelihoods(
    model: Captioner | CoCa,
    params: Params,
    source: Source,
    preprocessing: ImagePreprocessing,
    labels_TL: Int[np.ndarray, "T L"],
    class_T: Int[np.ndarray, " T"],
    *,
    mesh: Mesh,
    batch_size: int = 32,
    max_examples: int | None = None,
) -> tuple[ImageRows, Float[np.ndarray, " C"]]:
    """(values [N, 2, C] of the images, the classes' priors [C]), all in nats.

    values[:, 0]: log of the sum over a class's texts of p(text | image), a text's probability being
    the product over its tokens and its end. values[:, 1]: the same of p(text | image) / p(text).
    Priors: as values[:, 0], without an image. The last two mean something where the model was
    trained without image at times.

    `labels_TL` are ids as the tokenizer's `encode_batch` gives them, `class_T` as of `prompts`.
    """
    tree, at_CR = build_tree(labels_TL), _places(class_T)
    with jax.set_mesh(mesh):
        prior_T = np.asarray(total(score_tree(model, params, None, tree)))[0]
    rows = map_images(
        lambda images: _class_scores(model, params, images, tree, prior_T, at_CR),
        source,
        preprocessing,
        mesh=mesh,
        batch_size=batch_size,
        max_examples=max_examples,
    )
    prior_CR = np.where(at_CR < 0, -np.inf, prior_T[at_CR])
    return rows, np.logaddexp.reduce(prior_CR, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _class_scores(
    model: Captioner | CoCa,
    params: Params,
    images_BHWC: Array,
    tree: TokenTree,
    prior_T: Array,
    at_CR: Array,
) -> Float[Array, "B 2 C"]:
    scores_BT = total(score_tree(model, params, images_BHWC, tree))
    both_2BT = (scores_BT, scores_BT - prior_T[None])
    is_none_1CR = (at_CR < 0)[None]
    joined_2BC = [
        jax.nn.logsumexp(jnp.where(is_none_1CR, -jnp.inf, x_BT[:, at_CR]), axis=-1)
        for x_BT in both_2BT
    ]
    return jnp.stack(joined_2BC, axis=1)


def _places(class_T: np.ndarray) -> Int[np.ndarray, "C R"]:
    """The numbers of each class's texts; -1 behind the last."""
    counts_C = np.bincount(class_T)
    rank_T = np.arange(len(class_T)) - np.repeat(np.cumsum(counts_C) - counts_C, counts_C)
    at_CR = np.full((len(counts_C), counts_C.max()), -1, np.int32)
    at_CR[class_T, rank_T] = np.arange(len(class_T))
    return at_CR


@functools.partial(jax.jit, static_argnums=0)
def _embed(towers: TwoTowers | CoCa, params: Params, tokens_TL: Array) -> Array:
    return towers.embed_text(params, tokens_TL)
