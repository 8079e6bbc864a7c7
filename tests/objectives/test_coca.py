"""CoCa's objective against log_softmax by hand, on cut batches, on meshes, and on one batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch, place_tree
from capjax.models.coca import CoCa, CoCaConfig
from capjax.objectives.coca import CoCaObjective, coca_prepare, coca_rows
from capjax.objectives.metrics import reduce_metrics

VOCAB_SIZE = 40
MODEL = CoCa(
    CoCaConfig(
        image_size=8,
        patch_size=4,
        width=32,
        depth=1,
        num_heads=2,
        mlp_dim=64,
        decoder_depth=2,
        caption_queries=4,
        vocab_size=VOCAB_SIZE,
        text_length=5,
    )
)
KEY = jax.random.key(2)


def make_batch(num_rows=8, captions=2):
    rng = np.random.default_rng(0)
    lengths = 1 + np.arange(num_rows * captions).reshape(num_rows, captions) % 5
    tokens = rng.integers(2, VOCAB_SIZE, (num_rows, captions, 5))
    place = np.arange(5)
    tokens = np.where(place == lengths[..., None] - 1, 1, tokens)
    tokens = np.where(place < lengths[..., None], tokens, 0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (num_rows, 8, 8, 3)), jnp.uint8),
        "tokens": jnp.asarray(tokens if captions > 1 else tokens[:, 0], jnp.int32),
        "position": jnp.arange(100, 100 + num_rows, dtype=jnp.uint32),
    }


@functools.cache
def trained_params():
    """Parameters whose zero-initialised head is not zero."""
    params = MODEL.init(jax.random.key(0))
    head = params["decoder"]["head"]
    head["kernel"] = 0.3 * jax.random.normal(jax.random.key(1), head["kernel"].shape)
    return params


def rows(params, batch, key, **settings):
    memory = MODEL.encode(params, batch["image"])
    return coca_rows(MODEL, params, memory, batch, key, **settings)


def run(params, batch, **settings):
    return jax.jit(functools.partial(rows, **settings))(
        params, coca_prepare(batch, KEY, **settings), KEY
    )


def clip_loss(image_BD, text_BD, scale):
    logits_BB = scale * image_BD @ text_BD.T
    nll = -jnp.diag(jax.nn.log_softmax(logits_BB)) - jnp.diag(jax.nn.log_softmax(logits_BB, 0))
    return jnp.mean(nll) / 2


@pytest.mark.parametrize("normalization", ["token", "caption"])
def test_loss_and_metrics_match_log_softmax(normalization):
    params, batch = trained_params(), make_batch()
    settings = {"label_smoothing": 0.1, "z_loss": 1e-2, "caption_weight": 3.0}
    loss, metrics, _ = run(params, batch, normalization=normalization, **settings)
    labels_RL = batch["tokens"].reshape(16, 5)
    inputs_RL = jnp.pad(labels_RL[:, :-1], ((0, 0), (1, 0)))
    memory_RQD = jnp.repeat(MODEL.encode(params, batch["image"]), 2, axis=0)
    logits_RLV = MODEL.logits(params, MODEL.hidden(params, inputs_RL, memory_RQD))
    logits_RLV = logits_RLV[..., :VOCAB_SIZE]
    off = 0.1 / (VOCAB_SIZE - 1)
    targets_RLV = jax.nn.one_hot(labels_RL, VOCAB_SIZE) * (0.9 - off) + off
    nll_RL = -jnp.sum(targets_RLV * jax.nn.log_softmax(logits_RLV), -1)
    z_RL = 1e-2 * jnp.square(jax.nn.logsumexp(logits_RLV, -1))
    is_token_RL = labels_RL != 0
    counts_R = is_token_RL.sum(1)

    def mean(x_RL):
        sums_R = jnp.where(is_token_RL, x_RL, 0).sum(1)
        return (
            sums_R.sum() / counts_R.sum()
            if normalization == "token"
            else (sums_R / counts_R).mean()
        )

    np.testing.assert_allclose(loss, 3 * mean(nll_RL + z_RL), rtol=1e-5)
    metrics = reduce_metrics(metrics)
    np.testing.assert_allclose(metrics["caption_loss"], loss / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["z_loss"], mean(z_RL), rtol=1e-3)
    np.testing.assert_allclose(
        metrics["token_loss"], (nll_RL * is_token_RL).sum() / is_token_RL.sum(), rtol=1e-5
    )
    np.testing.assert_allclose(metrics["tokens_per_caption"], counts_R.mean(), rtol=1e-6)


def test_the_default_weighs_captions_twice():
    params = MODEL.init(jax.random.key(0))  # every token equally likely
    loss, metrics, _ = run(params, make_batch(captions=1))
    np.testing.assert_allclose(loss, 2 * np.log(VOCAB_SIZE), rtol=1e-6)
    assert set(metrics) == {"caption_loss", "token_loss", "tokens_per_caption"}
    assert CoCaObjective().contrastive_weight == 1


@pytest.mark.parametrize("captions", [1, 2])
def test_embeddings_are_those_of_retrieval(captions):
    params, batch = trained_params(), make_batch(captions=captions)
    _, _, embeddings = run(params, batch, image_dropout=0.5)
    assert embeddings["text"].shape == (8, captions, 32)
    want = MODEL.embed_text(params, batch["tokens"].reshape(-1, 5)).reshape(8, captions, 32)
    np.testing.assert_allclose(embeddings["text"], want, atol=1e-5)
    want = MODEL.embed_image(params, MODEL.encode(params, batch["image"]))
    np.testing.assert_allclose(embeddings["image"], want, atol=1e-5)


def test_dropped_images_are_dropped_for_captions_alone():
    params, batch = trained_params(), make_batch()
    other = batch | {"image": batch["image"][::-1]}
    loss, metrics, embeddings = run(params, batch, image_dropout=1.0)
    other_loss, _, other_embeddings = run(params, other, image_dropout=1.0)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    assert np.abs(embeddings["image"] - other_embeddings["image"]).max() > 0.05
    assert reduce_metrics(metrics)["conditional_causal_loss"] == 0

    @jax.jit
    def encoder_gradients(params, batch):
        def losses(params):
            loss, _, embeddings = rows(params, batch, KEY, image_dropout=1.0)
            return loss, jnp.sum(embeddings["image"][:, 0])

        return [x["encoder"]["norm"]["scale"] for x in jax.jacrev(losses)(params)]

    captions, contrast = encoder_gradients(params, coca_prepare(batch, KEY))
    assert np.all(captions == 0) and np.all(contrast != 0)


def test_some_images_are_dropped():
    """Each image for all of its captions; without dropout the loss is that of the seen ones."""
    params, batch = trained_params(), make_batch()
    settings = {"normalization": "caption", "caption_weight": 1.0}
    mixed, metrics, _ = run(params, batch, image_dropout=0.5, **settings)
    none, _, _ = run(params, batch, **settings)
    metrics = reduce_metrics(metrics)
    parts = [metrics[f"{name}_causal_loss"] for name in ("conditional", "unconditional")]
    assert min(parts) > 0 and min(parts) < mixed < max(parts)
    assert abs(mixed - none) > 1e-4


def test_parts_of_a_batch_sum_up_to_it():
    params, batch = trained_params(), make_batch()
    prepared = coca_prepare(batch, KEY)
    halves = [{k: x[i : i + 4] for k, x in prepared.items()} for i in (0, 4)]
    parts = [jax.jit(rows)(params, half, KEY) for half in halves]
    loss, _, embeddings = run(params, batch)
    np.testing.assert_allclose((parts[0][0] + parts[1][0]) / 2, loss, rtol=1e-5)
    for name, whole in embeddings.items():
        joined = jnp.concatenate([part[2][name] for part in parts])
        np.testing.assert_allclose(joined, whole, atol=1e-5)


def total_loss(params, batch, probe_BKD):
    loss, _, embeddings = rows(params, batch, KEY, image_dropout=0.5, z_loss=1e-3)
    scale, _ = MODEL.logit_scale_and_bias(params)
    cosine_BKD = embeddings["image"][:, None] * embeddings["text"] * probe_BKD
    return loss + scale * jnp.mean(cosine_BKD)


@pytest.mark.parametrize("shape", [MeshShape(data=8), MeshShape(data=1, fsdp=4, tensor=2)], ids=str)
def test_loss_and_gradient_on_a_mesh(shape):
    params, batch = trained_params(), make_batch()
    batch["probe"] = jax.random.normal(jax.random.key(5), (8, 2, 32))

    def compute(params, batch):
        prepared = coca_prepare(batch, KEY)
        return total_loss(params, prepared, prepared["probe"])

    compute = jax.jit(jax.value_and_grad(compute))
    want = compute(params, batch)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        placed = place_tree(mesh, params, MODEL.param_specs())
        found = compute(placed, place_batch(mesh, jax.device_get(batch)))
    np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found[1]), jax.tree.leaves(want[1]), strict=True
    ):
        error = np.max(np.abs(np.asarray(a) - np.asarray(b)))
        assert error <= 2e-5 * (1e-2 + np.max(np.abs(b))), (jax.tree_util.keystr(path), error)


def test_one_batch_is_learnt_by_heart():
    """Captions and contrast together fall by more than 90 % within 60 steps."""
    params, batch = MODEL.init(jax.random.key(0)), make_batch(captions=1)
    tokens = batch["tokens"].at[:, 0].set(jnp.arange(8) + 2)  # no two captions are equal
    batch = coca_prepare(batch | {"tokens": tokens}, KEY)

    def loss_fn(params):
        loss, _, embeddings = rows(params, batch, KEY)
        scale, _ = MODEL.logit_scale_and_bias(params)
        contrast = clip_loss(embeddings["image"], embeddings["text"][:, 0], scale)
        return loss + contrast, (loss, contrast)

    tx = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        (_, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, losses

    state, history = tx.init(params), []
    for _ in range(60):
        params, state, losses = step(params, state)
        history.append([float(loss) for loss in losses])
    for first, last in zip(history[0], history[-1], strict=True):
        assert last < 0.1 * first, (history[0], history[-1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"caption_weight": -1.0}, "objective.coca.caption_weight=-1.0: expected 0 or more"),
        ({"z_loss": float("nan")}, "objective.coca.z_loss=nan"),
        ({"image_dropout": 1.5}, "objective.coca.image_dropout=1.5: expected 0 to 1"),
        ({"label_smoothing": 1.0}, "objective.coca.label_smoothing=1.0: expected 0 to less"),
        ({"normalization": "row"}, "objective.coca.normalization='row': choose caption or token"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        CoCaObjective(**fields)
