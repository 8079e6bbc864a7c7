"""Weighted sums of objectives: what they add up to, on any mesh and however the batch is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch, place_tree
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.coca import CoCa, CoCaConfig
from capjax.models.towers import Towers
from capjax.models.two_towers import TwoTowers, TwoTowersConfig
from capjax.objectives.captioning_objective import CaptioningObjective
from capjax.objectives.coca import CoCaObjective
from capjax.objectives.combined import Objectives, combined_loss
from capjax.objectives.contrastive import ContrastiveObjective
from capjax.training.state import init_state
from capjax.training.step import make_train_step

B, K, L = 32, 2, 6
ENCODER = {
    "image_size": 16,
    "patch_size": 8,
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "mlp_dim": 32,
    "pool": "map",
}
TEXT = {"vocab_size": 40, "text_length": L}
CAPTIONER = Captioner(CaptionerConfig(**ENCODER, **TEXT))
TWO_TOWERS = TwoTowers(TwoTowersConfig(**ENCODER, **TEXT, logit_bias_init=-2.0))
COCA = CoCa(CoCaConfig(**ENCODER, **TEXT, decoder_depth=2, caption_queries=4))

OFF = CaptioningObjective(weight=0.0)
CAPPA = CaptioningObjective(parallel_draw="fixed", normalization="token", image_dropout=0.25)
SIGMOID = ContrastiveObjective(weight=0.5, kind="sigmoid")
SOFTMAX = ContrastiveObjective(weight=1.0, kind="softmax", label_smoothing=0.1, max_logit_scale=9.0)
ICMLM = CaptioningObjective(parallel_fraction=1.0, masking_ratio=0.5, score_visible=False)
CASES = {
    "cappa": (Towers(captioner=CAPTIONER), Objectives(CAPPA)),
    "icmlm": (Towers(captioner=CAPTIONER), Objectives(ICMLM)),
    "siglip": (Towers(two_towers=TWO_TOWERS), Objectives(OFF, SIGMOID)),
    "clip": (Towers(two_towers=TWO_TOWERS), Objectives(OFF, SOFTMAX)),
    "coca": (Towers(coca=COCA), Objectives(OFF, coca=CoCaObjective(weight=1.0, z_loss=1e-3))),
    "siglip_cappa": (
        Towers(captioner=CAPTIONER, two_towers=TWO_TOWERS),
        Objectives(CaptioningObjective(weight=2.0, z_loss=1e-3), SIGMOID),
    ),
}


def batch(captions_per_image=1):
    rng = np.random.default_rng(0)
    shape = (B, captions_per_image, L) if captions_per_image > 1 else (B, L)
    lengths = rng.integers(2, L + 1, shape[:-1])[..., None]
    tokens = np.where(np.arange(L) < lengths, rng.integers(2, 40, shape), 0)
    tokens = np.where(np.arange(L) == lengths - 1, 1, tokens).astype(np.int32)
    return {
        "image": rng.integers(0, 256, (B, 16, 16, 3), np.uint8),
        "tokens": tokens,
        "position": np.arange(B, dtype=np.uint32),
    }


def device_batch():
    return {name: jnp.asarray(x) for name, x in batch().items()}


@functools.cache
def host_params(name):
    """Parameters with every array random, so that no gradient is 0 for being at the start."""
    params = CASES[name][0].init(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    noisy = [np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(treedef, noisy)


def one_step(name, shape, accumulation_steps=1, captions_per_image=1):
    """The metrics of one step, and the gradient as plain SGD leaves it in the parameters."""
    towers, objectives = CASES[name]
    mesh = make_mesh(shape, devices=jax.devices()[: 1 if shape.data == 1 == shape.fsdp else 8])
    tx = optax.sgd(1.0)
    loss = combined_loss(towers, objectives, captions_per_image)
    step = make_train_step(loss, tx, accumulation_steps=accumulation_steps)
    with jax.set_mesh(mesh):
        params = place_tree(mesh, host_params(name), towers.param_specs())
        state = jax.jit(lambda: init_state(towers.init, tx, 0))()._replace(params=params)
        state, metrics = step(state, place_batch(mesh, batch(captions_per_image)))
        return jax.device_get((metrics, state.params))


@functools.cache
def whole(name):
    return one_step(name, MeshShape(data=1))


def assert_close(found, expected, tolerance):
    for (path, x), y in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        scale = max(1.0, float(np.abs(y).max()))
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x / scale, y / scale, atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "accumulation_steps"),
    [(name, MeshShape(data=2, fsdp=2, tensor=2), 2) for name in CASES]
    + [("siglip_cappa", MeshShape(data=1), 4)]
    + [("siglip_cappa", MeshShape(data=1, fsdp=4, tensor=2), 1)],
)
def test_neither_mesh_nor_microbatches_change_loss_or_gradient(name, shape, accumulation_steps):
    assert_close(one_step(name, shape, accumulation_steps), whole(name), 2e-5)


def test_the_sum_is_weighed_and_shares_one_encoder():
    towers, objectives = CASES["siglip_cappa"]
    parts = [
        (2.0, Towers(captioner=CAPTIONER), Objectives(objectives.captioning)),
        (0.5, Towers(two_towers=TWO_TOWERS), Objectives(OFF, SIGMOID)),
    ]
    params, rows, key = host_params("siglip_cappa"), device_batch(), jax.random.key(7)

    def value_and_grad(towers, objectives):
        loss = combined_loss(towers, objectives)
        return jax.jit(jax.value_and_grad(lambda p: loss.whole(p, rows, key)[0]))(params)

    value, grad = value_and_grad(towers, objectives)
    found = [value_and_grad(models, objective) for _, models, objective in parts]
    np.testing.assert_allclose(value, sum(value for value, _ in found), rtol=1e-6)
    assert_close(grad, jax.tree.map(lambda x, y: x + y, found[0][1], found[1][1]), 1e-5)
    metrics = combined_loss(towers, objectives).whole(params, rows, key)[1]
    weighed = 0.5 * metrics["contrastive_loss"]
    assert weighed < value


def test_the_images_are_encoded_once():
    towers, objectives = CASES["siglip_cappa"]
    loss = combined_loss(towers, objectives)
    params, rows, key = host_params("siglip_cappa"), device_batch(), jax.random.key(7)

    def flops(loss):
        compiled = jax.jit(lambda p: loss.whole(p, rows, key)[0]).lower(params).compile()
        return compiled.cost_analysis()["flops"]

    captioning = flops(combined_loss(Towers(captioner=CAPTIONER), objectives))
    pairs = flops(combined_loss(Towers(two_towers=TWO_TOWERS), objectives))
    encoder = flops_of_encoder(params, rows["image"])
    assert flops(loss) == pytest.approx(captioning + pairs - encoder, rel=0.02)


def flops_of_encoder(params, images):
    compiled = jax.jit(lambda p: CAPTIONER.encode(p, images)).lower(params).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("name", ["siglip_cappa", "coca"])
def test_several_captions_an_image_of_which_all_are_alike_change_nothing(name):
    towers, objectives = CASES[name]
    loss = combined_loss(towers, objectives)
    # No draws: the captions of one image would have modes of their own.
    if objectives.captioning.weight:
        plain = CaptioningObjective(weight=2.0, parallel_fraction=0.0)
        loss = combined_loss(towers, Objectives(plain, ContrastiveObjective()))
    params, one, key = host_params(name), device_batch(), jax.random.key(7)
    many = one | {"tokens": jnp.stack([one["tokens"]] * K, 1)}
    embeddings = loss.rows(params, loss.prepared(many, key), key)
    alone = loss.rows(params, loss.prepared(one, key), key)
    np.testing.assert_allclose(embeddings[0], alone[0], rtol=2e-5)
    text_BKD = embeddings[2]["text"]
    np.testing.assert_allclose(text_BKD[:, 1], alone[2]["text"][:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.0, 0.0, 0.0), "expected coca alone, or any sum of the others"),
        ((1.0, 0.0, 1.0), "expected coca alone"),
    ],
)
def test_objectives_that_do_not_go_together_are_refused(weights, message):
    captioning, contrastive, coca = weights
    objectives = Objectives(
        CaptioningObjective(weight=captioning),
        ContrastiveObjective(weight=contrastive),
        CoCaObjective(weight=coca),
    )
    with pytest.raises(UserError, match=message):
        objectives.models_needed()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "triplet"}, "choose sigmoid or softmax"),
        ({"weight": -1.0}, r"contrastive\.weight=-1\.0: expected 0 or more"),
        ({"label_smoothing": 0.1}, "is of the softmax"),
        ({"label_smoothing": 1.0, "kind": "softmax"}, "less than 1"),
    ],
)
def test_settings_that_are_wrong_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        ContrastiveObjective(**fields)
