"""The fused cross entropy against log_softmax on whole logits, on one device and on meshes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from capjax.mesh import MeshShape, act_BL, act_BLD, make_mesh
from capjax.objectives.cross_entropy import token_nll, weighted_nll

B, L, E, V, VOCAB_SIZE = 16, 6, 16, 128, 120


def arrays(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 6)
    hidden_BLE = jax.random.normal(keys[0], (B, L, E)).astype(dtype)
    kernel_EV = jax.random.normal(keys[1], (E, V))
    bias_V = jax.random.normal(keys[2], (V,))
    weights_BL = jax.random.normal(keys[3], (B, L))
    is_token_BL = jax.random.bernoulli(keys[4], 0.6, (B, L)).at[0].set(False)
    labels_BL = jax.random.randint(keys[5], (B, L), 1, VOCAB_SIZE) * is_token_BL
    return hidden_BLE, kernel_EV, bias_V, weights_BL, labels_BL


def plain(hidden_BLE, kernel_EV, bias_V, weights_BL, labels_BL, label_smoothing=0.0, z_loss=0.0):
    logits_BLV = (hidden_BLE @ kernel_EV + bias_V[None, None, :])[..., :VOCAB_SIZE]
    off = label_smoothing / (VOCAB_SIZE - 1)
    targets_BLV = jax.nn.one_hot(labels_BL, VOCAB_SIZE) * (1 - label_smoothing - off) + off
    nll_BL = -jnp.sum(targets_BLV * jax.nn.log_softmax(logits_BLV), -1) * (labels_BL != 0)
    penalty_BL = z_loss * jax.nn.logsumexp(logits_BLV, -1) ** 2 * (labels_BL != 0)
    return jnp.sum(weights_BL * (nll_BL + penalty_BL)), nll_BL


def recomputing(hidden_BLE, kernel_EV, bias_V, weights_BL, labels_BL, **options):
    """`token_nll` with the interface of `weighted_nll`."""
    options = {"vocab_size": VOCAB_SIZE} | options
    nll_BL = token_nll(hidden_BLE, kernel_EV, bias_V, labels_BL, **options)
    return jnp.sum(weights_BL * nll_BL), nll_BL


def fused(hidden_BLE, kernel_EV, bias_V, weights_BL, labels_BL, **options):
    options = {"vocab_size": VOCAB_SIZE} | options
    return weighted_nll(hidden_BLE, kernel_EV, bias_V, labels_BL, weights_BL, **options)


def values_and_gradients(function, arguments, **options):
    function = functools.partial(function, **options)
    return jax.jit(jax.value_and_grad(function, (0, 1, 2, 3), has_aux=True))(*arguments)


@functools.cache
def expected_on_one_device(**options):
    return values_and_gradients(plain, arrays(), **options)


def assert_close(actual, expected, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize("function", [recomputing, fused])
@pytest.mark.parametrize("chunk", [None, 5, 1000])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_values_and_gradients_are_those_of_log_softmax(function, chunk, label_smoothing):
    options = {"label_smoothing": label_smoothing, "chunk": chunk}
    actual = values_and_gradients(function, arrays(), **options)
    assert_close(actual, expected_on_one_device(label_smoothing=label_smoothing))


@pytest.mark.parametrize("options", [{}, {"chunk": 5, "label_smoothing": 0.1}])
def test_z_loss_adds_the_squared_logsumexp_to_the_sum_and_not_to_the_nll(options):
    actual = values_and_gradients(fused, arrays(), z_loss=0.02, **options)
    options.pop("chunk", None)
    assert_close(actual, expected_on_one_device(z_loss=0.02, **options))


def test_z_loss_closed_form():
    # Logits 0, 0, log 2 of the ids 0 to 2: their exponentials sum to 4.
    bias_V = jnp.log(jnp.array([1.0, 1.0, 2.0]))
    labels_BL, weights_BL = jnp.array([[2, 1]]), jnp.array([[3.0, 0.5]])
    arguments = (jnp.zeros((1, 2, 4)), jnp.zeros((4, 3)), bias_V)

    def total(bias_V):
        options = {"vocab_size": 3, "z_loss": 0.1}
        return weighted_nll(*arguments[:2], bias_V, labels_BL, weights_BL, **options)

    (value, nll_BL), slope_V = jax.value_and_grad(total, has_aux=True)(bias_V)
    np.testing.assert_allclose(nll_BL, np.log([[2.0, 4.0]]), rtol=1e-6)
    expected = 3 * np.log(2) + 0.5 * np.log(4) + 3.5 * 0.1 * np.log(4) ** 2
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    shares_V = np.array([0.25, 0.25, 0.5])
    plain_V = 3.5 * shares_V - np.array([0, 0.5, 3.0])
    np.testing.assert_allclose(slope_V, plain_V + 3.5 * 0.1 * 2 * np.log(4) * shares_V, rtol=1e-5)


@pytest.mark.parametrize("function", [recomputing, fused])
def test_finite_differences(function):
    hidden_BLE, kernel_EV, bias_V, weights_BL, labels_BL = arrays()

    @jax.jit
    def total(hidden_BLE, kernel_EV, bias_V):
        return function(hidden_BLE, kernel_EV, bias_V, weights_BL, labels_BL)[0]

    inputs = (hidden_BLE, 0.3 * kernel_EV, bias_V)
    check_grads(total, inputs, order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


def test_only_the_sum_carries_a_gradient():
    gradient = jax.grad(lambda hidden, *rest: fused(hidden, *rest)[1].sum())(*arrays())
    assert not gradient.any()


def test_zero_logits_cost_the_log_of_the_vocabulary_with_any_smoothing():
    hidden_BLE, kernel_EV, bias_V, _, labels_BL = arrays()
    for label_smoothing in (0.0, 0.3):
        nll_BL = token_nll(
            hidden_BLE,
            0 * kernel_EV,
            0 * bias_V,
            labels_BL,
            vocab_size=VOCAB_SIZE,
            label_smoothing=label_smoothing,
        )
        np.testing.assert_allclose(nll_BL[labels_BL != 0], np.log(VOCAB_SIZE), rtol=1e-6)
        assert not nll_BL[labels_BL == 0].any()


def test_label_smoothing_closed_form():
    # Probabilities 1/2, 1/4, 1/4 of ids 0, 1, 2; a label 1 smoothed by 0.2 is (0.1, 0.8, 0.1).
    bias_V = jnp.log(jnp.array([0.5, 0.25, 0.25]))
    nll_BL = token_nll(
        jnp.zeros((1, 1, 4)),
        jnp.zeros((4, 3)),
        bias_V,
        jnp.ones((1, 1), jnp.int32),
        vocab_size=3,
        label_smoothing=0.2,
    )
    np.testing.assert_allclose(nll_BL[0, 0], 0.1 * np.log(2) + 0.9 * np.log(4), rtol=1e-6)


def test_padding_columns_and_padding_tokens_do_not_matter():
    hidden_BLE, kernel_EV, bias_V, weights_BL, labels_BL = arrays()
    expected = values_and_gradients(fused, arrays())
    spoilt_BLE = jnp.where((labels_BL == 0)[..., None], 100.0, hidden_BLE)
    spoilt = (spoilt_BLE, kernel_EV.at[:, VOCAB_SIZE:].set(50), bias_V.at[VOCAB_SIZE:].set(50))
    total, (_, kernel_grad_EV, bias_grad_V, _) = values_and_gradients(
        fused, (*spoilt, weights_BL, labels_BL)
    )
    assert_close(total, expected[0])
    assert_close((kernel_grad_EV, bias_grad_V), expected[1][1:3])
    assert not kernel_grad_EV[:, VOCAB_SIZE:].any()


@pytest.mark.parametrize("function", [recomputing, fused])
def test_bfloat16_products_sum_in_float32(function):
    arguments = arrays(jnp.bfloat16)
    rounded = (
        arguments[0].astype(jnp.float32),
        arguments[1].astype(jnp.bfloat16).astype(jnp.float32),
        *arguments[2:],
    )
    # The CPU computes wider than asked, so what is asked for is looked up too.
    asked = str(jax.make_jaxpr(functools.partial(function, chunk=7))(*arguments))
    assert f"f32[7,{V}]" in asked and f"bf16[7,{V}]" not in asked
    (total, nll_BL), gradients = values_and_gradients(function, arguments)
    expected, expected_gradients = values_and_gradients(plain, rounded)
    assert_close((total, nll_BL), expected)
    assert [x.dtype for x in gradients] == [jnp.bfloat16, *[jnp.float32] * 3]
    assert_close(jax.tree.map(lambda x: x.astype(jnp.float32), gradients), expected_gradients, 2e-2)


def test_memory_stays_below_one_array_of_logits():
    shape_BL, embed, vocab = (16, 64), 32, 8192
    arguments = (
        jax.ShapeDtypeStruct((*shape_BL, embed), jnp.float32),
        jax.ShapeDtypeStruct((embed, vocab), jnp.float32),
        jax.ShapeDtypeStruct((vocab,), jnp.float32),
        jax.ShapeDtypeStruct(shape_BL, jnp.float32),
        jax.ShapeDtypeStruct(shape_BL, jnp.int32),
    )

    def temporary_bytes(function):
        step = jax.jit(jax.value_and_grad(function, (0, 1, 2), has_aux=True))
        return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    def on_whole_logits(hidden_BLE, kernel_EV, bias_V, weights_BL, labels_BL):
        logits_BLV = hidden_BLE @ kernel_EV + bias_V[None, None, :]
        labels_BL1 = labels_BL[..., None]
        label_logit_BL = jnp.take_along_axis(logits_BLV, labels_BL1, -1, mode="clip")[..., 0]
        nll_BL = jax.nn.logsumexp(logits_BLV, -1) - label_logit_BL
        return jnp.sum(weights_BL * nll_BL), nll_BL

    logits_bytes = np.prod(shape_BL) * vocab * 4
    options = {"vocab_size": vocab}
    assert temporary_bytes(functools.partial(fused, **options)) < logits_bytes / 2
    assert temporary_bytes(functools.partial(recomputing, **options)) < logits_bytes / 2
    assert temporary_bytes(on_whole_logits) >= logits_bytes  # the measure sees them


@pytest.mark.parametrize(
    ("function", "shape", "kernel_spec"),
    [
        (fused, (1, 8, 1, 1), P()),
        (fused, (1, 1, 4, 2), P("fsdp", "tensor")),
        (fused, (2, 2, 1, 2), P(None, "tensor")),
        (fused, (1, 1, 1, 8), P("fsdp", "tensor")),
        (recomputing, (1, 2, 2, 2), P("fsdp", "tensor")),
    ],
)
def test_meshes_agree_with_one_device(function, shape, kernel_spec):
    options = {"label_smoothing": 0.1} | ({"z_loss": 0.02} if function is fused else {})
    expected = expected_on_one_device(**options)
    with jax.set_mesh(make_mesh(MeshShape(*shape))):
        specs = (act_BLD, kernel_spec, P(*kernel_spec[1:]), act_BL, act_BL)
        arguments = [jax.device_put(x, s) for x, s in zip(arrays(), specs, strict=True)]
        actual = values_and_gradients(function, arguments, **options)
        assert_close(jax.device_get(actual), expected, 2e-5)
        for gradient, x in zip(actual[1], arguments, strict=False):
            assert jax.typeof(gradient) == jax.typeof(x)


def test_the_kernel_gradient_is_summed_over_devices_once():
    mesh = make_mesh(MeshShape(data=8))
    with jax.set_mesh(mesh):
        specs = (act_BLD, P(), P(), act_BL, act_BL)
        arguments = [jax.device_put(x, s) for x, s in zip(arrays(), specs, strict=True)]
        step = jax.jit(jax.value_and_grad(fused, (0, 1, 2), has_aux=True))
        program = step.lower(*arguments).compile().as_text()
    computations = re.split(r"\n(?=\S)", program)
    loops = [text for text in computations if " while(" in text]
    bodies = re.findall(r"body=%?([\w.-]+)", program)
    assert loops and bodies
    for text in computations:
        if any(re.match(rf"%?{re.escape(body)} ", text) for body in bodies):
            assert "all-reduce" not in text and "all-gather" not in text
    sums = [line for line in program.splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    assert sum(f"f32[{E},{V}]" in line for line in sums) == 1
