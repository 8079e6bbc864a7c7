"""Contrastive losses by hand, and the chunked form against the full one, on meshes too."""

import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from capjax.errors import UserError
from capjax.mesh import BATCH, MeshShape, make_mesh
from capjax.objectives.contrastive import clamped, sigmoid_loss, softmax_loss

D, SCALE, BIAS = 16, 7.0, -3.0
FIXTURE = Path(__file__).parents[1] / "fixtures" / "big_vision_siglip.npz"
LOSSES = {
    "sigmoid": sigmoid_loss,
    "softmax": softmax_loss,
    "smooth": functools.partial(softmax_loss, label_smoothing=0.1),
}


def embeddings(B, K, seed=0):
    """Unit rows; a caption resembles its image, not always enough to be the best one."""
    keys = jax.random.split(jax.random.key(seed), 2)
    image_BD = jax.random.normal(keys[0], (B, D))
    text_BKD = 0.5 * image_BD[:, None, :] + jax.random.normal(keys[1], (B, K, D))
    return unit(image_BD), unit(text_BKD)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def arguments(name, B, K):
    scalars = (SCALE, BIAS) if name == "sigmoid" else (SCALE,)
    return *embeddings(B, K), *(jnp.float32(x) for x in scalars)


@functools.cache
def compiled(name, **options):
    """((loss, metrics), gradients) of all arguments."""
    loss = functools.partial(LOSSES[name], **options)
    count = 4 if name == "sigmoid" else 3
    return jax.jit(jax.value_and_grad(loss, tuple(range(count)), has_aux=True))


def results(name, inputs, mesh=None, **options):
    if mesh is None:
        return jax.device_get(compiled(name, **options)(*inputs))
    with jax.set_mesh(mesh):
        image_BD = jax.device_put(inputs[0], P(BATCH, None))
        text_BKD = jax.device_put(inputs[1], P(BATCH, None, None))
        placed = (image_BD, text_BKD, *inputs[2:])
        found = compiled(name, **options)(*placed)
        for gradient, x in zip(found[1][:2], placed[:2], strict=True):
            assert jax.typeof(gradient) == jax.typeof(x)
        return jax.device_get(found)


@functools.cache
def full(name, B, K):
    return results(name, arguments(name, B, K), chunked=False)


def assert_equal(actual, expected, tolerance=1e-5):
    """Relative to the largest entry of each array; metrics are of the order of the logits."""
    (loss, metrics), gradients = actual
    (expected_loss, expected_metrics), expected_gradients = expected
    assert metrics.keys() == expected_metrics.keys()
    for metric, value in expected_metrics.items():
        np.testing.assert_allclose(
            metrics[metric], value, rtol=tolerance, atol=1e-5, err_msg=metric
        )
    np.testing.assert_allclose(loss, expected_loss, rtol=tolerance)
    for x, y in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max())


def by_hand(name, image_BD, text_BKD, scale, bias=0.0):
    """The loss and the metrics in float64, from targets written out."""
    image_BD, text_BKD = np.asarray(image_BD, np.float64), np.asarray(text_BKD, np.float64)
    B, K, _ = text_BKD.shape
    logits_BT = float(scale) * image_BD @ text_BKD.reshape(B * K, -1).T + float(bias)
    is_positive_BT = np.arange(B)[:, None] == np.arange(B * K)[None, :] // K
    if name == "sigmoid":
        signed_BT = np.where(is_positive_BT, logits_BT, -logits_BT)
        loss = np.log1p(np.exp(-signed_BT)).sum() / (B * K)
    else:
        smoothing = 0.1 if name == "smooth" else 0.0

        def cross_entropy(logits_XY, is_positive_XY):
            logprobs_XY = logits_XY - np.log(np.exp(logits_XY).sum(1, keepdims=True))
            count_X1 = is_positive_XY.sum(1, keepdims=True)
            others_X1 = np.maximum((~is_positive_XY).sum(1, keepdims=True), 1)
            off_X1 = smoothing / others_X1
            target_XY = np.where(is_positive_XY, (1 - smoothing) / count_X1, off_X1)
            return -(target_XY * logprobs_XY).sum(1).mean()

        loss = cross_entropy(logits_BT, is_positive_BT) + cross_entropy(
            logits_BT.T, is_positive_BT.T
        )
        loss /= 2
    best_B = np.where(is_positive_BT, logits_BT, -np.inf).max(1)
    negative_BT = np.where(is_positive_BT, -np.inf, logits_BT)
    own_T = logits_BT[np.arange(B * K) // K, np.arange(B * K)]
    return loss, {
        "image_to_text_accuracy": (best_B > negative_BT.max(1)).mean(),
        "text_to_image_accuracy": (own_T > negative_BT.max(0)).mean(),
        "positive_logit": logits_BT[is_positive_BT].mean(),
        "negative_logit": logits_BT[~is_positive_BT].mean(),
        "scale": float(scale),
    }


def test_sigmoid_of_two_pairs():
    # Cosines 1, 0 / 0.6, 0.8, scale 2, bias -1: logits 1, -1 / 0.2, 0.6.
    image_BD = jnp.array([[1.0, 0.0], [0.6, 0.8]])
    text_BKD = jnp.eye(2)[:, None, :]
    for chunked in (False, True):
        loss, metrics = sigmoid_loss(
            image_BD, text_BKD, jnp.float32(2), jnp.float32(-1), chunked=chunked
        )
        terms = [math.log1p(math.exp(x)) for x in (-1, -1, 0.2, -0.6)]
        np.testing.assert_allclose(loss, sum(terms) / 2, rtol=1e-6)
        np.testing.assert_allclose(metrics["positive_logit"], (1 + 0.6) / 2, rtol=1e-6)
        np.testing.assert_allclose(metrics["negative_logit"], (-1 + 0.2) / 2, rtol=1e-6)


def test_softmax_of_two_pairs():
    # Logits 2, 0 / 1.2, 1.6: rows, then columns.
    image_BD = jnp.array([[1.0, 0.0], [0.6, 0.8]])
    text_BKD = jnp.eye(2)[:, None, :]
    terms = [math.log1p(math.exp(x)) for x in (0 - 2, 1.2 - 1.6, 1.2 - 2, 0 - 1.6)]
    for chunked in (False, True):
        loss, _ = softmax_loss(image_BD, text_BKD, jnp.float32(2), chunked=chunked)
        np.testing.assert_allclose(loss, sum(terms) / 4, rtol=1e-6)


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_values_in_float64_from_the_targets(name, K):
    inputs = arguments(name, 16, K)
    (loss, metrics), _ = full(name, 16, K)
    expected, expected_metrics = by_hand(name, *inputs)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    for metric, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[metric], value, rtol=1e-5, atol=1e-6, err_msg=metric)
    assert 0 < metrics["image_to_text_accuracy"] < 1 and 0 < metrics["text_to_image_accuracy"] < 1


@pytest.mark.parametrize("chunked", [False, True])
def test_big_vision(chunked):
    case = {
        name.removeprefix("siglip/"): x
        for name, x in np.load(FIXTURE).items()
        if name.startswith("siglip/")
    }
    image_BD, text_BKD = jnp.asarray(case["out/zimg"]), jnp.asarray(case["out/ztxt"][:, None])
    t, b = (jnp.asarray(case[f"params/{name}"][0]) for name in "tb")

    def sigmoid(t, b):
        return sigmoid_loss(image_BD, text_BKD, jnp.exp(t), b, chunked=chunked, chunk_size=3)[0]

    loss, gradients = jax.value_and_grad(sigmoid, (0, 1))(t, b)
    np.testing.assert_allclose(loss, case["out/sigmoid_loss"], rtol=1e-6)
    np.testing.assert_allclose(gradients[0], case["grad/t"][0], rtol=1e-5)
    np.testing.assert_allclose(gradients[1], case["grad/b"][0], rtol=1e-5)
    loss, metrics = softmax_loss(image_BD, text_BKD, jnp.exp(t), chunked=chunked, chunk_size=3)
    np.testing.assert_allclose(loss, case["out/softmax_loss"], rtol=1e-6)
    diagonal_B = np.diagonal(case["out/logits"]) - case["params/b"]
    np.testing.assert_allclose(metrics["positive_logit"], diagonal_B.mean(), rtol=1e-5)


@pytest.mark.parametrize(("B", "K", "size"), [(16, 1, 4), (16, 3, 5), (13, 2, 100), (1, 1, 0)])
@pytest.mark.parametrize("name", LOSSES)
def test_chunks_give_what_the_whole_gives(name, B, K, size):
    actual = results(name, arguments(name, B, K), chunked=True, chunk_size=size)
    assert_equal(actual, full(name, B, K))


@pytest.mark.parametrize(
    ("shape", "B", "K", "size", "chunked"),
    [
        ((1, 8, 1, 1), 8, 1, 0, True),  # one pair a device
        ((1, 1, 8, 1), 32, 3, 3, True),  # chunks that divide neither 4 nor 12
        ((1, 2, 2, 2), 16, 3, 5, True),
        ((2, 2, 2, 1), 16, 1, 1, True),
        ((1, 1, 1, 8), 13, 2, 5, True),  # all devices alike
        ((1, 2, 2, 2), 16, 3, 0, False),
    ],
)
@pytest.mark.parametrize("name", ["sigmoid", "smooth"])
def test_meshes_agree_with_one_device(name, shape, B, K, size, chunked):
    mesh = make_mesh(MeshShape(*shape))
    actual = results(name, arguments(name, B, K), mesh, chunked=chunked, chunk_size=size)
    assert_equal(actual, full(name, B, K))


@pytest.mark.parametrize("shape", [None, (1, 2, 2, 2), (1, 1, 8, 1)])
@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_no_device_holds_more_than_a_tile(name, shape):
    """The largest array of the program, forward and backward, is that of a device's captions."""
    B, K, size = 64, 2, 4
    inputs = arguments(name, B, K)

    def largest(chunked):
        if shape is None:
            return largest_array(name, inputs, chunked, size)
        with jax.set_mesh(make_mesh(MeshShape(*shape))):
            image_BD = jax.device_put(inputs[0], P(BATCH, None))
            text_BKD = jax.device_put(inputs[1], P(BATCH, None, None))
            return largest_array(name, (image_BD, text_BKD, *inputs[2:]), chunked, size)

    shards = 1 if shape is None else shape[0] * shape[1] * shape[2]
    assert largest(True) <= B * K * D // shards  # the captions of a device
    assert largest(False) >= B * B * K // shards  # the measure sees them


def largest_array(name, inputs, chunked, size):
    """Entries of the largest array of the compiled program, which is that of one device."""
    step = compiled(name, chunked=chunked, chunk_size=size)
    program = step.lower(*inputs).compile().as_text()
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_the_order_of_the_pairs_does_not_matter():
    image_BD, text_BKD, *scalars = arguments("smooth", 16, 3)
    order_B = np.random.default_rng(0).permutation(16)
    (loss, metrics), gradients = full("smooth", 16, 3)
    permuted = (image_BD[order_B], text_BKD[order_B][:, ::-1], *scalars)
    actual = results("smooth", permuted, chunked=True, chunk_size=5)
    expected = (gradients[0][order_B], gradients[1][order_B][:, ::-1], gradients[2])
    assert_equal(actual, ((loss, metrics), expected))


def test_a_tie_is_a_miss():
    """Pairs 0 and 1 are alike, pair 2 stands alone; 3 has its own caption and that of 2."""
    image_BD = jnp.eye(4)[jnp.array([0, 0, 1, 2])]
    text_BKD = jnp.eye(4)[jnp.array([[0, 3], [0, 3], [1, 3], [2, 1]])]
    for chunked in (False, True):
        _, metrics = softmax_loss(image_BD, text_BKD, jnp.float32(5), chunked=chunked, chunk_size=3)
        assert metrics["image_to_text_accuracy"] == 1 / 4  # the last alone
        assert metrics["text_to_image_accuracy"] == 2 / 8  # the first of the last two images


def test_a_loss_of_many_captions_is_the_mean_over_them():
    """Equal captions of an image cost what one costs, up to the negatives they add."""
    image_BD, text_BKD, *scalars = arguments("sigmoid", 8, 1)
    twice = jnp.tile(text_BKD, (1, 2, 1))
    once = sigmoid_loss(image_BD, text_BKD, *scalars)[0]
    np.testing.assert_allclose(sigmoid_loss(image_BD, twice, *scalars)[0], once, rtol=1e-6)
    once = softmax_loss(image_BD, text_BKD, scalars[0])[0]
    expected = once + math.log(2) / 2  # twice as many captions to choose from
    np.testing.assert_allclose(softmax_loss(image_BD, twice, scalars[0])[0], expected, rtol=1e-6)


def test_bfloat16_products_sum_in_float32():
    image_BD, text_BKD, *scalars = arguments("sigmoid", 16, 2)
    rounded = image_BD.astype(jnp.bfloat16), text_BKD.astype(jnp.bfloat16)
    wide = tuple(x.astype(jnp.float32) for x in rounded)
    for name in ("sigmoid", "smooth"):
        rest = scalars if name == "sigmoid" else scalars[:1]
        step = compiled(name, chunked=True, chunk_size=8)
        asked = str(jax.make_jaxpr(step)(*rounded, *rest))  # the CPU computes wider than asked
        products = re.findall(r":(\w+)\[[\d,]+\] = dot_general", asked)
        assert len(products) == (3 if name == "sigmoid" else 4) and set(products) == {"f32"}
        (loss, _), gradients = step(*rounded, *rest)
        (expected, _), expected_gradients = step(*wide, *rest)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        assert [x.dtype for x in gradients[:2]] == [jnp.bfloat16] * 2
        for x, y in zip(gradients, expected_gradients, strict=True):
            x = np.asarray(x, np.float32)
            np.testing.assert_allclose(x, y, rtol=2e-2, atol=2e-2 * np.abs(y).max())


def test_large_scales_stay_finite():
    for name in LOSSES:
        rest = (jnp.float32(1e4), jnp.float32(-10.0))[: 2 if name == "sigmoid" else 1]
        inputs = (*embeddings(16, 1), *rest)
        actual = results(name, inputs, chunked=True, chunk_size=5)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual))
        assert_equal(actual, results(name, inputs, chunked=False), 1e-4)


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_memory_is_linear_and_below_the_embeddings_own(name):
    """Temporary bytes at 32,768 pairs of width 768: at most 0.6 of embeddings and gradients."""

    def temporary_bytes(B):
        scalars = [jax.ShapeDtypeStruct((), jnp.float32)] * (2 if name == "sigmoid" else 1)
        image_BD = jax.ShapeDtypeStruct((B, 768), jnp.float32)
        text_BKD = jax.ShapeDtypeStruct((B, 1, 768), jnp.float32)
        step = compiled(name, chunked=True).lower(image_BD, text_BKD, *scalars).compile()
        return step.memory_analysis().temp_size_in_bytes

    at_32k = temporary_bytes(32_768)
    assert at_32k <= 0.6 * 4 * 32_768 * 768 * 4
    assert temporary_bytes(65_536) <= 2.05 * at_32k


def test_a_clamped_scale_finds_back():
    def gradient(scale, sign):
        return jax.grad(lambda scale: sign * clamped(scale, 100.0))(jnp.float32(scale))

    assert clamped(jnp.float32(30), 100.0) == 30 and clamped(jnp.float32(300), 100.0) == 100
    assert gradient(30, 1) == 1 and gradient(30, -1) == -1
    assert gradient(300, 1) == 1  # descent makes it smaller
    assert gradient(300, -1) == 0


def test_a_negative_chunk_size_is_an_error():
    with pytest.raises(UserError, match="chunk_size=-1: expected"):
        softmax_loss(*arguments("softmax", 4, 1), chunk_size=-1)
