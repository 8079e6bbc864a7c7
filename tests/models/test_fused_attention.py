"""Which kernel is chosen, and that a kernel is called for the same numbers as the plain form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding

from capjax.errors import UserError
from capjax.mesh import MeshShape, act_BLNK, make_mesh
from capjax.models import Captioner, fused_attention
from capjax.models.attention import MASKED, attend


def arrays(num_queries, num_keys, dtype="bfloat16"):
    lengths = (num_queries, num_keys, num_keys)
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, (4, length, 2, 8), dtype)
        for key, length in zip(keys, lengths, strict=True)
    ]


def chosen(
    implementation, num_queries=64, num_keys=64, *, has_bias=False, dtype="bfloat16", width=8
):
    query, key = (jnp.zeros((4, length, 2, width), dtype) for length in (num_queries, num_keys))
    return fused_attention.choose(implementation, query, key, has_bias=has_bias)


@pytest.fixture
def on(monkeypatch):
    """`on("cuda")`: the backend is taken to be that one."""
    return lambda backend: monkeypatch.setattr(fused_attention, "_backend", lambda: backend)


def test_automatic_choice_on_a_gpu(on):
    on("cuda")
    assert chosen("auto") == chosen("auto", 257, 257) == chosen("cudnn") == "cudnn"
    assert chosen("auto", dtype="float32") == chosen("auto", width=12) == "xla"
    assert chosen("auto", has_bias=True) == "xla"
    assert chosen("auto", 1) == chosen("cudnn", 1) == "xla"
    on("gpu")  # a GPU that has no cuDNN, or is too old for it
    assert chosen("auto") == "xla"


def test_automatic_choice_on_a_tpu(on):
    on("tpu")
    assert chosen("auto", 1024, 1024) == chosen("pallas", 1024, 1000) == "pallas"
    assert chosen("auto", 256, 256) == chosen("auto", 64, 1024) == chosen("auto", 576, 576) == "xla"
    assert chosen("auto", 512, 512, has_bias=True) == "xla"


def test_on_a_cpu_there_is_nothing_to_choose(config):
    assert chosen("auto") == chosen("xla") == "xla"
    model = Captioner(dataclasses.replace(config, attention="cudnn"))
    with pytest.raises(UserError, match="attention='cudnn' needs the backend 'cuda', but this one"):
        jax.eval_shape(model.encode, model.abstract_params(), jnp.zeros((1, 8, 8, 3), jnp.uint8))


def test_wishes_that_cannot_be_met_are_refused(on):
    on("cuda")
    with pytest.raises(UserError, match="attention='pallas' needs the backend 'tpu'"):
        chosen("pallas")
    with pytest.raises(UserError, match=r"bfloat16 or float16, but dtype='float32'; set it to 'au"):
        chosen("cudnn", dtype="float32")
    with pytest.raises(UserError, match="multiple of 8 up to 128, but it is 12"):
        chosen("cudnn", width=12)


def value_and_gradients(implementation, arrays, bias, *, is_causal):
    def loss(query, key, value):
        attended = attend(
            query, key, value, bias, is_causal=is_causal, implementation=implementation
        )
        return jnp.sum(jnp.sin(attended.astype(jnp.float32))), attended

    found = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), jax.device_get(found))


def random_bias(num_queries, num_keys):
    is_visible = jax.random.bernoulli(jax.random.key(3), 0.5, (4, 1, num_queries, num_keys))
    return jnp.where(is_visible.at[..., 0].set(True), 0.0, MASKED)


@pytest.fixture
def stand_in(monkeypatch, on):
    """JAX's plain form in place of cuDNN, where JAX would call that; the calls are kept."""
    on("cuda")
    plain, calls = jax.nn.dot_product_attention, []

    def call(*arrays, implementation, **options):
        assert implementation == "cudnn"
        calls.append([x.shape for x in arrays])
        return plain(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    return calls


@pytest.mark.parametrize(
    ("lengths", "is_causal", "has_bias"),
    [((6, 6), True, False), ((5, 7), False, False), ((5, 5), True, True)],
)
def test_cudnn_is_asked_for_the_plain_form(lengths, is_causal, has_bias, stand_in):
    bias = random_bias(*lengths) if has_bias else None
    args = (arrays(*lengths), bias)
    found = value_and_gradients("cudnn", *args, is_causal=is_causal)
    want = value_and_gradients("xla", *args, is_causal=is_causal)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02)
    assert stand_in and all(shape[1] % 2 == 0 for shapes in stand_in for shape in shapes)


def test_on_a_mesh_each_device_calls_for_its_rows_and_heads(stand_in):
    rows = arrays(6, 6)
    want = value_and_gradients("xla", rows, None, is_causal=True)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, act_BLNK)) for x in rows]
        found = value_and_gradients("auto", placed, None, is_causal=True)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02)
    assert {shape for shapes in stand_in for shape in shapes} == {(1, 6, 1, 8)}


def test_a_captioner_through_the_kernel(stand_in, config, params, batch):
    """Whatever rows and masks there are: maskless, causal, and common to the batch."""

    def states(attention):
        model = Captioner(dataclasses.replace(config, dtype="bfloat16", attention=attention))

        def compute(params, images):
            memory = model.encode(params, images)
            causal = model.hidden(params, batch["tokens"], memory)
            mixed = model.hidden(params, batch["tokens"], memory, batch["is_parallel"])
            return causal, mixed, model.parallel_hidden(params, memory, 6)

        return jax.jit(compute)(params, batch["image"])

    found, want = states("cudnn"), states("xla")
    assert len(stand_in) >= 7
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.1)


def test_pallas_in_its_interpreter(on):
    """Causal, under a mask, and of lengths that are padded."""
    on("tpu")
    args = (arrays(5, 7, "float32"), random_bias(5, 7))
    want = value_and_gradients("xla", *args, is_causal=True)
    with pltpu.force_tpu_interpret_mode():
        found = value_and_gradients("pallas", *args, is_causal=True)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
