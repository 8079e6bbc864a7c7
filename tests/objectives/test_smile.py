"""SMILE: the published form's vectors, and the gathered form against masks on whole logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from capjax.errors import UserError
from capjax.mesh import MeshShape, act_BL, act_BLD, make_mesh
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.objectives.caption_loss import LIKELIHOOD, Smile, caption_loss
from capjax.objectives.captioning import captioning_rows, decoder_inputs
from capjax.objectives.captioning_objective import CaptioningObjective
from capjax.objectives.metrics import reduce_metrics
from capjax.objectives.smile import is_first, smile_nll

LOGITS = np.array([[[2, 1, 0, 0, -1], [0, 1, 2, 0, 1], [1, 0, 0, 3, 0]]], np.float32)
LABELS = np.array([[1, 2, 4]], np.int32)
HEAD = (jnp.eye(5), jnp.zeros(5))  # hidden states are the logits themselves
MLE = [1.523744, 0.696357, 3.250522]
PUBLISHED = [0.407606, 0.551445, 1.098612]
ROWS, LENGTH, WIDTH, VOCAB_SIZE, STORED = 8, 6, 16, 60, 64


def test_vectors():
    options = {"vocab_size": 5}
    found = smile_nll(jnp.asarray(LOGITS), *HEAD, jnp.asarray(LABELS), **options)
    np.testing.assert_allclose(found[0], PUBLISHED, atol=2e-6)
    found = smile_nll(jnp.asarray(LOGITS), *HEAD, jnp.asarray(LABELS), **options, subset="reverse")
    np.testing.assert_allclose(found[0], [1.407606, 0.239545, 3.169846], atol=2e-6)


@pytest.mark.parametrize(
    ("smile", "expected"),
    [
        (LIKELIHOOD, 1.823541),
        (Smile(1.0, first_token=False), 0.685888),
        (Smile(1.0), 1.057934),
        (Smile(0.99), 1.065590),
    ],
)
def test_vectors_of_mixes(smile, expected):
    loss, nll_RL, metrics = caption_loss(
        *(jnp.asarray(LOGITS), HEAD, jnp.asarray(LABELS), jnp.ones(1)), vocab_size=5, smile=smile
    )
    np.testing.assert_allclose(loss, expected, atol=2e-6)
    np.testing.assert_allclose(nll_RL[0], MLE, atol=2e-6)  # what is reported is comparable
    if smile.weight:
        found = reduce_metrics(metrics)["smile_loss"]
        np.testing.assert_allclose(found, np.mean(PUBLISHED[smile.first_token :]), atol=2e-6)


def test_a_word_counts_once_and_a_caption_of_one_costs_nothing():
    labels_RL = jnp.array([[3, 3, 5, 0], [2, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(is_first(labels_RL), [[1, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    logits_RLV = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 6)), jnp.float32)
    head = (jnp.eye(6), jnp.zeros(6))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def cost(logits_RLV):
        cost_RL = smile_nll(logits_RLV, *head, labels_RL, vocab_size=6)
        return cost_RL.sum(), cost_RL

    (_, found), slope = cost(logits_RLV)
    pair_L2 = logits_RLV[0, :3][:, jnp.array([3, 5])]
    expected = jax.nn.logsumexp(pair_L2, -1) - pair_L2[jnp.arange(3), jnp.array([0, 0, 1])]
    np.testing.assert_allclose(found[0, :3], expected, rtol=1e-5)
    assert found[0, 3] == 0 and not found[1:].any()
    assert np.isfinite(slope).all() and not slope[1:].any()


def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden_RLE = jax.random.normal(keys[0], (ROWS, LENGTH, WIDTH))
    kernel_EV = 0.5 * jax.random.normal(keys[1], (WIDTH, STORED))
    bias_V = jax.random.normal(keys[2], (STORED,))
    lengths_R = jnp.arange(ROWS) % (LENGTH + 1)  # one row is empty
    labels_RL = jax.random.randint(keys[3], (ROWS, LENGTH), 1, VOCAB_SIZE)
    labels_RL = labels_RL.at[:, 3].set(labels_RL[:, 0])  # a repeated word
    return (
        hidden_RLE,
        kernel_EV,
        bias_V,
        jnp.where(jnp.arange(LENGTH)[None] < lengths_R[:, None], labels_RL, 0),
    )


def masked(hidden_RLE, kernel_EV, bias_V, labels_RL, subset):
    """The definition: whole logits, and a mask [R, V] of the ids in each label."""
    logits_RLV = hidden_RLE @ kernel_EV + bias_V[None, None]
    own_RLV = jax.nn.one_hot(labels_RL, STORED) > 0
    in_label_RV = own_RLV.any(1).at[:, 0].set(False)
    allowed_RLV = in_label_RV[:, None] if subset == "label" else own_RLV | ~in_label_RV[:, None]
    allowed_RLV = allowed_RLV & (jnp.arange(STORED) < VOCAB_SIZE)[None, None]
    normal_RL = jax.nn.logsumexp(jnp.where(allowed_RLV, logits_RLV, -1e9), -1)
    label_RL = jnp.take_along_axis(logits_RLV, labels_RL[..., None], -1)[..., 0]
    return jnp.where(labels_RL > 0, normal_RL - label_RL, 0)


def value_and_slopes(function):
    """Of a sum of the costs, weighed unevenly."""

    def total(hidden_RLE, kernel_EV, bias_V, labels_RL):
        cost_RL = function(hidden_RLE, kernel_EV, bias_V, labels_RL)
        return jnp.sum(cost_RL * jnp.cos(jnp.arange(ROWS * 1.0))[:, None])

    return jax.jit(jax.value_and_grad(total, (0, 1, 2)))


@pytest.mark.parametrize("subset", ["label", "reverse"])
def test_the_gathered_form_is_the_masked_form(subset):
    expected = value_and_slopes(functools.partial(masked, subset=subset))(*arrays())
    gathered = value_and_slopes(functools.partial(smile_nll, vocab_size=VOCAB_SIZE, subset=subset))
    found = gathered(*arrays())
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


def test_a_split_vocabulary_is_not_gathered_and_eight_devices_are_one():
    expected = value_and_slopes(functools.partial(smile_nll, vocab_size=VOCAB_SIZE))(*arrays())
    with jax.set_mesh(make_mesh(MeshShape(data=2, tensor=4))):
        specs = (act_BLD, P(None, "tensor"), P("tensor"), act_BL)
        split = [jax.device_put(x, spec) for x, spec in zip(arrays(), specs, strict=True)]
        compiled = (
            value_and_slopes(functools.partial(smile_nll, vocab_size=VOCAB_SIZE))
            .lower(*split)
            .compile()
        )
        assert "all-gather" not in compiled.as_text()
        found = compiled(*split)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


def test_the_captioning_objective_mixes_it_in():
    model = Captioner(
        CaptionerConfig(
            image_size=8,
            patch_size=8,
            width=8,
            depth=1,
            num_heads=1,
            mlp_dim=8,
            vocab_size=9,
            text_length=4,
        )
    )
    params = jax.tree.map(
        lambda x: jnp.cos(jnp.arange(x.size * 1.0)).reshape(x.shape), model.abstract_params()
    )
    tokens_BL = jnp.array([[3, 3, 5, 1], [2, 1, 0, 0]])
    rows = {"tokens": tokens_BL, "position": jnp.arange(2, dtype=jnp.uint32)}

    @jax.jit
    def loss(params):
        settings = {"parallel_fraction": 0.0, "smile_weight": 0.5, "smile_first_token": False}
        memory_BPD = jnp.ones((2, 1, 8))
        value, metrics = captioning_rows(
            model, params, memory_BPD, rows, jax.random.key(0), **settings
        )
        hidden_BLE = model.hidden(
            params, decoder_inputs(tokens_BL, None, model.mask_id), memory_BPD
        )
        head = model.output_head(params)
        return value, reduce_metrics(metrics), smile_nll(hidden_BLE, *head, tokens_BL, vocab_size=9)

    value, metrics, smile_BL = loss(params)
    smile = np.mean([smile_BL[0].mean(), smile_BL[1, :2].mean()])
    np.testing.assert_allclose(value, 0.5 * metrics["causal_loss"] + 0.5 * smile, rtol=1e-5)
    np.testing.assert_allclose(metrics["smile_loss"], smile_BL.sum() / 6, rtol=1e-5)
    assert metrics["smile_loss"] < metrics["token_loss"]


def test_it_wants_causal_rows():
    with pytest.raises(UserError, match=r"smile_weight=0.5 with parallel_fraction=0.75.*=0$"):
        CaptioningObjective(smile_weight=0.5)
    with pytest.raises(UserError, match="smile_subset='random': choose label or reverse"):
        CaptioningObjective(parallel_fraction=0.0, smile_subset="random")
