"""The text tower learns grammar: its loss, what learns and what does not, its file."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capjax.data.tokenizer import Tokenizer
from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError
from capjax.models.towers import Towers
from capjax.models.two_towers import TwoTowers, TwoTowersConfig
from capjax.objectives.contrastive import ContrastiveObjective, contrastive_loss
from capjax.rewards import corruption
from capjax.rewards.grammar import (
    grammar_logits,
    read_grammar_head,
    write_grammar_head,
)
from capjax.rewards.grammar_tower import (
    TowerTraining,
    fit_grammar_tower,
    grammar_tower_loss,
    own_objective,
    read_grammar_tower,
    text_arrays,
    write_grammar_tower,
)
from capjax.rewards.grammar_training import GrammarTraining
from capjax.training.patterns import by_name
from tests.evaluation import tiny

LETTERS = "abcdefghijkl"
DIM = 16
HEAD = GrammarTraining(steps=100, batch_size=64, learning_rate=3e-3, copies=1, held_out=0.2)
FEW = TowerTraining(steps=2, batch_size=8, learning_rate=1e-3)


@functools.cache
def two_towers():
    config = TwoTowersConfig(
        image_size=8,
        patch_size=4,
        width=DIM,
        depth=1,
        num_heads=2,
        mlp_dim=32,
        vocab_size=272,
        text_length=10,  # a letter is two tokens
    )
    return Towers(two_towers=TwoTowers(config))


@functools.cache
def loaded(seed=0):
    """Two towers whose text side, without positions, cannot tell the order of words."""
    params = two_towers().init(jax.random.key(seed))
    text = params["text_encoder"]
    positions = jnp.zeros_like(text["position_embedding"])
    params["text_encoder"] = text | {"position_embedding": positions}
    config = {"objective": {"contrastive": {"weight": 1.0, "kind": "sigmoid"}}}
    return LoadedModel(two_towers(), params, words(), tiny.PREPROCESSING, config, step=0)


@functools.cache
def words():
    return Tokenizer.train([" ".join(LETTERS)] * 4, 272)


def rising(count):
    """Captions of four rising letters, and embeddings of images that are made of the same."""
    rng = np.random.default_rng(0)
    drawn = [sorted(rng.choice(len(LETTERS), 4, replace=False)) for _ in range(count)]
    letter_LD = rng.normal(size=(len(LETTERS), DIM))
    image_ND = np.stack([letter_LD[places].sum(0) for places in drawn])
    image_ND /= np.linalg.norm(image_ND, axis=1, keepdims=True)
    return [[" ".join(LETTERS[i] for i in row)] for row in drawn], image_ND.astype(np.float32)


@pytest.mark.parametrize("kind", ["siglip", "coca"])
def test_the_loss_is_contrast_and_grammar_and_reaches_the_text_side_alone(kind):
    towers = two_towers() if kind == "siglip" else tiny.towers()
    objective = ContrastiveObjective(kind="sigmoid" if kind == "siglip" else "softmax")
    embedder, rng = towers.embedder, np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)

    params = jax.tree.map(lambda x: draw(*x.shape), towers.abstract_params())
    whole_BL, broken_BL = jnp.asarray(rng.integers(2, 60, (2, 6, 8)), jnp.int32)
    image_BD = draw(6, DIM)
    image_BD /= jnp.linalg.norm(image_BD, axis=1, keepdims=True)
    head = {"hidden": draw(DIM, 5), "output": draw(5, 2)}

    def ours(params, head, weight):
        return grammar_tower_loss(
            embedder, objective, params, head, image_BD, whole_BL, broken_BL, weight
        )

    def contrast(params):
        text_BD = embedder.embed_text(params, whole_BL)
        logits = embedder.logit_scale_and_bias(params)
        return contrastive_loss(objective, image_BD, text_BD[:, None], *logits)[0]

    def close(ours, other):
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-6)

    both = jax.jit(jax.value_and_grad(ours, (0, 1)))
    value, (grads, head_grads) = both(params, head, 0.0)
    expected, expected_grads = jax.jit(jax.value_and_grad(contrast))(params)
    close(value, expected)
    jax.tree.map(close, grads, expected_grads)
    assert not any(x.any() for x in jax.tree.leaves(head_grads))

    value, (grads, head_grads) = both(params, head, 2.0)
    feature_TD = jax.jit(embedder.text_feature)(params, jnp.concatenate([whole_BL, broken_BL]))
    logits_T2 = grammar_logits(head, feature_TD)
    labels_T = jnp.arange(12) < 6
    cross = optax.softmax_cross_entropy_with_integer_labels(logits_T2, labels_T.astype(int))
    close(value, expected + 2 * jnp.mean(cross))
    reached = {name for name, x in by_name(grads).items() if x.any()}
    model = LoadedModel(towers, params, words(), tiny.PREPROCESSING, {}, step=0)
    assert reached == set(text_arrays(model))
    assert any("text" in name or "unimodal" in name for name in reached)
    assert not any(name.startswith(("encoder", "image")) or "pooler" in name for name in reached)
    assert all(x.any() for x in jax.tree.leaves(head_grads))


def test_the_tower_learns_an_order_that_its_features_did_not_tell(monkeypatch):
    monkeypatch.setattr(corruption, "OPERATIONS", (corruption.shuffle,))
    towers, (captions, image_ND) = loaded(), rising(250)
    first = jax.device_get(towers.params)
    training = TowerTraining(steps=300, batch_size=64, learning_rate=3e-3)
    made = fit_grammar_tower(towers, captions, image_ND, training, HEAD)
    assert made.before["grammar_accuracy"] < 0.55  # the head has seen bags of words
    assert made.after["grammar_accuracy"] > 0.65
    for name in ("text_to_image", "image_to_text"):
        assert made.after[name] > made.before[name] + 0.3
    changed = {
        name for name, x in by_name(made.towers.params).items() if (x != by_name(first)[name]).any()
    }
    assert changed == set(text_arrays(towers))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(towers.params), first)


def test_on_a_mesh_and_in_a_file_it_is_the_same(tmp_path):
    captions, image_ND = rising(40)
    image_ND[3] = 0  # of an image that cannot be read
    captions[5] = []
    towers, path = loaded(), str(tmp_path / "tower.npz")
    made = fit_grammar_tower(towers, captions, image_ND, FEW, HEAD)
    without = [row for row in range(40) if row not in (3, 5)]
    others = fit_grammar_tower(
        towers.on_mesh(tiny.EIGHT), [captions[i] for i in without], image_ND[without], FEW, HEAD
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(made.head), others.head)
    alike = text_arrays(made.towers), text_arrays(others.towers)
    assert others.after == made.after
    for text in alike[1].values():
        assert text.sharding.mesh.size == 8
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, alike))

    write_grammar_tower(path, made.towers, made.head)
    again, head = read_grammar_tower(path, towers)
    jax.tree.map(np.testing.assert_array_equal, head, jax.device_get(made.head))
    jax.tree.map(
        np.testing.assert_array_equal, *map(jax.device_get, (again.params, made.towers.params))
    )
    with pytest.raises(UserError, match="belongs to the text tower"):
        read_grammar_head(path, DIM)
    with pytest.raises(UserError, match="was trained with other towers"):
        read_grammar_tower(path, loaded(seed=1))
    write_grammar_head(path, head)
    with pytest.raises(UserError, match="holds no text tower of the sizes"):
        read_grammar_tower(path, towers)


def test_the_loss_is_the_one_that_the_towers_were_trained_with():
    sigmoid = loaded()
    config = dataclasses.replace(two_towers().two_towers.config, logit_bias_init=None)
    towers = Towers(two_towers=TwoTowers(config))
    softmax = dataclasses.replace(sigmoid, towers=towers, params=towers.abstract_params())
    trained = {"weight": 0.5, "kind": "softmax", "label_smoothing": 0.1, "max_logit_scale": 100.0}
    told = dataclasses.replace(sigmoid, config={"objective": {"contrastive": trained}})
    assert own_objective(told) == ContrastiveObjective(**trained)
    for model, kind in ((sigmoid, "sigmoid"), (softmax, "softmax")):
        converted = dataclasses.replace(model, config={})
        assert own_objective(converted) == ContrastiveObjective(kind=kind)
    coca = LoadedModel(
        tiny.towers(),
        tiny.params(),
        words(),
        tiny.PREPROCESSING,
        {"objective": {"coca": {"weight": 1.0, "max_logit_scale": 50.0}}},
        step=0,
    )
    assert own_objective(coca) == ContrastiveObjective(kind="softmax", max_logit_scale=50.0)


def test_what_cannot_be_learnt_from_is_said():
    captions, image_ND = rising(4)
    with pytest.raises(UserError, match="captions of 3 images, embeddings of 4"):
        fit_grammar_tower(loaded(), captions[:3], image_ND)
    with pytest.raises(UserError, match="0 different captions"):
        fit_grammar_tower(loaded(), [[]] * 4, image_ND)
    fast = dataclasses.replace(FEW, learning_rate=1e30)
    with pytest.raises(UserError, match=r"tower.learning_rate=1e\+30: the training .* diverged"):
        fit_grammar_tower(loaded(), *rising(40), fast, HEAD)
    for fields in (
        {"steps": 0},
        {"batch_size": 1},
        {"learning_rate": 0.0},
        {"grammar_weight": -1.0},
    ):
        with pytest.raises(UserError, match=f"grammar.tower.{next(iter(fields))}="):
            TowerTraining(**fields)
