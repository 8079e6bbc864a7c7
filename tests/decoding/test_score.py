"""Scores of captions against closed forms, against generation, and on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.decoding.classify import class_scores, score_tree
from capjax.decoding.score import mean, score, score_priors, score_tokens, total
from capjax.decoding.token_tree import build_tree
from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch, place_tree
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.coca import CoCa, CoCaConfig
from tests.decoding.conftest import generate

SIZES = {
    "image_size": 8,
    "patch_size": 4,
    "width": 32,
    "depth": 1,
    "num_heads": 4,
    "mlp_dim": 48,
    "decoder_width": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "decoder_mlp_dim": 32,
    "vocab_size": 21,
    "text_length": 7,
}
MODELS = {
    "captioner": Captioner(CaptionerConfig(**SIZES, null_memory="learned")),
    "rotary": Captioner(CaptionerConfig(**SIZES, decoder_posemb="rotary", decoder_qk_norm=True)),
    "coca": CoCa(CoCaConfig(**SIZES, caption_queries=5, embedding_dim=24)),
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random_params(model):
    """Of sizes that move everything: neither the head nor the null memory is zero."""
    rng = np.random.default_rng(1)

    def draw(path, x):
        is_scale = jax.tree_util.keystr(path).endswith("scale']")
        return jnp.asarray(rng.normal(is_scale, 0.25, x.shape), jnp.float32)

    return jax.tree.map_with_path(draw, model.abstract_params())


def random_texts(num: int, seed: int, length: int = 7) -> np.ndarray:
    """Ids of few kinds, so that many share a prefix; some are cut, the first is the end alone."""
    rng = np.random.default_rng(seed)
    texts = np.zeros((num, length), np.int32)
    for number, row in enumerate(texts):
        stop = number % (length + 1)
        row[:stop] = rng.integers(2, 5, stop)
        row[stop : stop + 1] = 1
    return texts


@functools.partial(jax.jit, static_argnums=0)
def closed_form(model, params, memory_BPD, labels_BSL):
    """log p of every token: a pass of its own for every caption, and the softmax written out."""

    def one(labels_BL):
        inputs_BL = jnp.pad(labels_BL[:, :-1], ((0, 0), (1, 0)))
        logits_BLV = model.logits(params, model.hidden(params, inputs_BL, memory_BPD))
        logprobs_BLV = jax.nn.log_softmax(logits_BLV[..., : model.config.vocab_size])
        found_BL = jnp.take_along_axis(logprobs_BLV, labels_BL[..., None], 2)[..., 0]
        return jnp.where(labels_BL == 0, 0.0, found_BL)

    return jax.lax.map(one, labels_BSL.swapaxes(0, 1)).swapaxes(0, 1)


@pytest.fixture(scope="module", params=list(MODELS))
def case(request):
    """(model, params, images [8, ...], their memory, the memory of no image)."""
    model = MODELS[request.param]
    params = random_params(model)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)), jnp.uint8)
    memory = model.encode(params, images)
    return model, params, images, memory, model.drop_memory(params, memory, jnp.ones(8, bool))


def test_several_captions_an_image(case):
    model, params, images, memory, null = case
    labels = jnp.asarray(random_texts(24, 0).reshape(8, 3, 7))
    want = closed_form(model, params, memory, labels)
    np.testing.assert_allclose(score_tokens(model, params, images, labels), want, **CLOSE)
    np.testing.assert_allclose(score_tokens(model, params, memory, labels), want, **CLOSE)
    one = score(model, params, memory, labels[:, 1])
    np.testing.assert_allclose(one, want[:, 1].sum(-1), **CLOSE)
    prior = closed_form(model, params, null, labels)
    np.testing.assert_allclose(score_tokens(model, params, None, labels), prior, **CLOSE)
    rows = np.asarray(labels).reshape(-1, 7)
    found = score_priors(model, params, np.concatenate([rows, rows[:5]]), multiple=8)
    want = np.asarray(prior).reshape(-1, 7)
    np.testing.assert_allclose(found, np.concatenate([want, want[:5]]), **CLOSE)


@pytest.mark.parametrize("chunk", [1, 1000])
def test_a_tree_scores_what_passes_of_their_own_do(case, chunk):
    model, params, images, memory, null = case
    texts = random_texts(40, 3)
    tree = build_tree(texts, chunk)
    assert (len(tree.token_XC) > 1) == (chunk == 1)
    everywhere = jnp.broadcast_to(texts[None], (8, *texts.shape))
    want = closed_form(model, params, memory, everywhere)
    found = score_tree(model, params, images, tree)
    np.testing.assert_allclose(found, want, **CLOSE)
    assert np.abs(np.asarray(found)[0] - np.asarray(found)[1]).max() > 1e-2
    prior = closed_form(model, params, null, everywhere)[:1]
    np.testing.assert_allclose(score_tree(model, params, None, tree), prior, **CLOSE)


@pytest.mark.parametrize("name", ["captioner", "coca"])
def test_scores_on_a_mesh(name):
    model = MODELS[name]
    params, texts = random_params(model), random_texts(16, 3)
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    labels, tree = texts.reshape(8, 2, 7), build_tree(texts, 1)
    rows = score_tokens(model, params, jnp.asarray(images), jnp.asarray(labels))
    want = [score_tree(model, params, x, tree) for x in (jnp.asarray(images), None)]
    priors = score_priors(model, params, texts, multiple=8)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    placed = place_tree(mesh, params, model.param_specs())
    with jax.set_mesh(mesh):
        batch = place_batch(mesh, {"image": images, "labels": labels})
        found = [score_tree(model, placed, x, tree) for x in (batch["image"], None)]
        spread = score_tokens(model, placed, batch["image"], batch["labels"])
        spread_priors = score_priors(model, placed, texts, multiple=8)
    np.testing.assert_allclose(spread, rows, **CLOSE)
    np.testing.assert_allclose(spread_priors, priors, **CLOSE)
    for one, other in zip(found, want, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


def test_a_generated_caption_scores_its_log_probability(model, params, images):
    made = generate(model, params, images, max_length=12, temperature=1.0)
    assert not np.all(made.finished_B)  # captions that were cut are scored without an end
    found = score_tokens(model, params, images, made.tokens_BL[:, None])[:, 0]
    np.testing.assert_allclose(found, made.logprobs_BL, atol=1e-5)


def test_probabilities_of_all_first_tokens_sum_to_one(model, params, images):
    num = model.config.vocab_size
    texts = np.stack([np.arange(1, num), np.zeros(num - 1, int)], axis=1)
    found = total(np.asarray(score_tree(model, params, images[:1], build_tree(texts))))
    memory = model.encode(params, images[:1])
    logits = model.logits(params, model.hidden(params, jnp.zeros((1, 1), jnp.int32), memory))
    padding = float(jax.nn.softmax(logits[0, 0])[0])
    np.testing.assert_allclose(np.exp(found).sum() + padding, 1.0, atol=1e-5)
    made = generate(model, params, images[:1], max_length=1)
    np.testing.assert_allclose(np.exp(found.max()), np.exp(made.logprobs_BL[0, 0]), rtol=1e-5)


def test_alpha_trades_the_likelihood_for_the_prior():
    """Without it the first of two captions is the better one, with half or all of it the second."""
    logprobs, priors = np.array([[-10.0], [-12.0]]), np.array([[-8.0], [-14.0]])
    np.testing.assert_array_equal(total(logprobs), [-10, -12])
    np.testing.assert_array_equal(total(logprobs, priors, 1.0), [-2, 2])
    np.testing.assert_array_equal(total(logprobs, priors, 0.5), [-6, -5])
    labels = np.array([[5, 4, 1, 0], [1, 0, 0, 0]])
    tokens = np.array([[-1.0, -2.0, -3.0, 0.0], [-4.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(mean(tokens, labels), [-2, -4])
    np.testing.assert_array_equal(mean(tokens, labels, tokens, 0.5), [-1, -2])


def test_prompts_of_a_class():
    scores = np.log([[0.1, 0.3, 0.2, 0.25]])
    np.testing.assert_allclose(np.exp(class_scores(scores, 2)), [[0.4, 0.45]])
    mean_scores = class_scores(scores, 2, combine="mean")
    np.testing.assert_allclose(np.exp(mean_scores), [[0.03**0.5, 0.05**0.5]])
    priors = np.log([0.1, 0.1, 0.4, 0.5])
    np.testing.assert_allclose(np.exp(class_scores(scores, 1, priors, 1.0)), [[1, 3, 0.5, 0.5]])
    with pytest.raises(UserError, match="combine='max'"):
        class_scores(scores, 2, combine="max")
    with pytest.raises(UserError, match="num_prompts=3"):
        class_scores(scores, 3)


def test_captions_beyond_the_text_length():
    model = MODELS["captioner"]
    params, images = random_params(model), jnp.zeros((1, 8, 8, 3), jnp.uint8)
    with pytest.raises(UserError, match="8 tokens"):
        score_tokens(model, params, images, jnp.ones((1, 1, 8), jnp.int32))
    with pytest.raises(UserError, match="8 tokens"):
        score_tree(model, params, images, build_tree(random_texts(3, 0, 8)))


def test_bfloat16_scores_alike_both_ways():
    model = MODELS["captioner"]
    half = Captioner(dataclasses.replace(model.config, dtype="bfloat16"))
    params, tree = random_params(model), build_tree(random_texts(16, 3))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)), jnp.uint8)
    labels = jnp.broadcast_to(tree.labels_TL[None], (2, *tree.labels_TL.shape))
    found = score_tree(half, params, images, tree)
    np.testing.assert_allclose(found, score_tokens(half, params, images, labels), atol=0.1)
