"""Low-rank adaptation: nothing changes at the start, then only the factors; the same on a mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_tree, replicated, reshard
from capjax.models import Captioner, CaptionerConfig
from capjax.objectives.objective import mean_over_rows
from capjax.training.lora import LORA, LoRA, held_patterns, merge, with_lora
from capjax.training.optimizer import OptimizerConfig, make_optimizer
from capjax.training.patterns import by_name
from capjax.training.state import TrainState
from capjax.training.step import make_train_step

MODEL = Captioner(
    CaptionerConfig(
        image_size=8,
        patch_size=4,
        width=16,
        depth=2,
        num_heads=2,
        mlp_dim=32,
        vocab_size=30,
        text_length=6,
    )
)
ALL = LoRA(rank=3, targets=("encoder", "decoder"))
# Input axes of a kernel of one layer, written out.
NUM_IN = {"patch_embedding": 3, "out": 2, "key_value": 1, "query": 1, "qkv": 1}


def adapted(settings: LoRA, *, moved: bool = False):
    """Parameters with factors; where `moved`, B is not zero."""
    params = with_lora(MODEL.init(jax.random.key(0)), jax.random.key(1), settings)
    if moved:
        params[LORA] = jax.tree.map(
            lambda x: jnp.cos(jnp.arange(x.size) + 0.0).reshape(x.shape), params[LORA]
        )
    return params


def test_before_the_first_step_the_merged_parameters_are_the_base_to_the_bit():
    params = adapted(ALL)
    merged, base = merge(params, ALL.scale), MODEL.init(jax.random.key(0))
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    jax.tree.map(np.testing.assert_array_equal, merged, base)
    assert by_name(params[LORA])["decoder/head/kernel/a"].std() == pytest.approx(1 / 3, rel=0.2)
    assert merge(base, 2.0) is base and with_lora(base, jax.random.key(1), LoRA()) is base


def test_merged_kernels_are_sums_of_matrices():
    params = adapted(ALL, moved=True)
    base, factors, merged = by_name(params), by_name(params[LORA]), by_name(merge(params, 0.5))
    kernels = [name for name in merged if name.endswith("/kernel")]
    assert {f"{name}/{x}" for name in kernels for x in "ab"} == set(factors)
    for name in merged:
        if name not in kernels:
            np.testing.assert_array_equal(merged[name], base[name])
            continue
        w, a, b = (
            np.asarray(x, np.float64)
            for x in (base[name], factors[f"{name}/a"], factors[f"{name}/b"])
        )
        if "blocks" not in name:
            w, a, b = w[None], a[None], b[None]
        num_in = NUM_IN.get(name.split("/")[-2], 1)
        for layer, (w_, a_, b_) in enumerate(zip(w, a, b, strict=True)):
            rows = math.prod(w_.shape[:num_in])
            expected = w_.reshape(rows, -1) + 0.5 * a_.reshape(rows, 3) @ b_.reshape(3, -1)
            found = np.asarray(merged[name]).reshape(w.shape)[layer].reshape(rows, -1)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, merge(params, 0.0), MODEL.init(jax.random.key(0)))


def loss_of(params):
    """Something of every merged parameter."""
    merged = jax.tree.leaves(merge(params, ALL.scale))
    return sum(jnp.sum(jnp.sin(reshard(x, replicated))) for x in merged)


def test_on_a_mesh_factors_are_split_as_their_kernels_and_all_is_the_same():
    attention = adapted(ALL)["decoder"]["blocks"]["self_attention"]
    base = {"blocks": {"attention": jax.tree.map(np.asarray, attention)}}
    specs = {"qkv": P(None, "fsdp", "tensor", None, None), "out": P(None, "tensor", None, "fsdp")}

    def loss_and_slopes(base):
        params = with_lora(base, jax.random.key(1), LoRA(rank=3))
        params[LORA] = jax.tree.map(lambda x: x + 1.0, params[LORA])
        return params[LORA], merge(params, 0.5), jax.grad(loss_of)(params)

    alone = jax.jit(loss_and_slopes)(base)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        stored = place_tree(
            mesh, base, {"blocks": {"attention": {k: {"kernel": v} for k, v in specs.items()}}}
        )
        factors, merged, slopes = jax.jit(loss_and_slopes)(stored)
    split = {name: tuple(x.sharding.spec) for name, x in by_name(factors).items()}
    assert split == {
        "blocks/attention/qkv/kernel/a": (None, "fsdp", None),
        "blocks/attention/qkv/kernel/b": (None, None, "tensor", None, None),
        "blocks/attention/out/kernel/a": (None, "tensor", None, None),
        "blocks/attention/out/kernel/b": (None, None, "fsdp"),
    }
    for name, x in by_name(merged).items():
        assert x.sharding.is_equivalent_to(by_name(stored)[name].sharding, x.ndim), name
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
        alone,
        (factors, merged, slopes),
    )


def test_a_step_moves_the_factors_and_what_is_named_and_keeps_moments_of_no_other():
    settings = LoRA(rank=2, targets=("decoder/.*attention",), train=("decoder/head/bias",))
    params = adapted(settings)
    before = jax.tree.map(np.asarray, params)
    config = OptimizerConfig(learning_rate=0.1, freeze=held_patterns(params, settings))
    tx, _ = make_optimizer(config, 10, jax.eval_shape(lambda: params))
    loss = mean_over_rows(lambda params, batch, key: (loss_of(params), {}))
    step = make_train_step(loss, tx, freeze=config.freeze)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.key(0))
    state, _ = step(state, {"position": jnp.zeros((1,), jnp.uint32)})
    moved = {
        n for n, x in by_name(state.params).items() if not np.array_equal(x, by_name(before)[n])
    }
    layers = ("self_attention/qkv", "self_attention/out", "cross_attention/query")
    layers += ("cross_attention/key_value", "cross_attention/out")
    # A has no slope before B has moved.
    assert moved == {f"lora/decoder/blocks/{x}/kernel/b" for x in layers} | {"decoder/head/bias"}
    # Two moments of each factor and of the bias, and counts.
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * (2 * len(layers) + 1)


def test_what_cannot_be_adapted_is_said():
    params = MODEL.init(jax.random.key(0))
    for fields, message in (
        ({"rank": -1}, "lora.rank=-1"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha=0"),
        ({"rank": 2, "init_std": -1.0}, "lora.init_std"),
        ({"rank": 2, "targets": ()}, "lora.targets is empty"),
        ({"rank": 2, "targets": ("decoder/norm",)}, "lora.targets='decoder/norm' matches no"),
    ):
        with pytest.raises(UserError, match=message):
            with_lora(params, jax.random.key(0), LoRA(**fields))
    with pytest.raises(UserError, match=r"lora.train='decoder/biass' matches no"):
        held_patterns(params, LoRA(rank=2, train=("decoder/biass",)))
    assert held_patterns(params, LoRA()) == ()
