"""Every optimizer's state, with frozen parameters and an average, from one mesh to another."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from capjax.checkpoint import Checkpointer, RunInfo
from capjax.mesh import MeshShape, make_mesh, out_sharding
from capjax.training.optimizer import OptimizerConfig, make_optimizer
from capjax.training.patterns import nested
from capjax.training.state import init_state

SPECS = {
    "encoder/blocks/attention/qkv/kernel": P(None, "fsdp", "tensor", None, None),
    "encoder/blocks/attention/qkv/bias": P(None, "tensor", None, None),
    "encoder/position_embedding": P(None, "fsdp"),
    "decoder/blocks/mlp/up/kernel": P(None, "fsdp", "tensor"),
    "decoder/head/kernel": P("fsdp", "tensor"),
}
SHAPES = {
    "encoder/blocks/attention/qkv/kernel": (2, 32, 4, 3, 32),
    "encoder/blocks/attention/qkv/bias": (2, 4, 3, 32),
    "encoder/position_embedding": (4, 32),
    "decoder/blocks/mlp/up/kernel": (2, 32, 40),
    "decoder/head/kernel": (160, 128),
}
RUN = RunInfo(config={}, preprocessing={}, tokenizer_model=b"")


def init_params(key):
    arrays = {
        name: jax.random.normal(key, shape, out_sharding=out_sharding(SPECS[name]))
        for name, shape in SHAPES.items()
    }
    return nested(arrays)


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(freeze=("encoder/.*",), second_moment_dtype="bfloat16", b2=0.9),
        OptimizerConfig(name="big_vision_adafactor", freeze=("decoder/head",)),
        OptimizerConfig(name="adafactor", layer_decay=0.5, multipliers=(("decoder", 2.0),)),
        OptimizerConfig(name="muon", first_moment_dtype="bfloat16", freeze=("encoder/blocks",)),
    ],
    ids=lambda config: config.name,
)
def test_a_state_goes_to_another_mesh_bit_for_bit(config, workdir):
    tx, _ = make_optimizer(config, 10)
    start = functools.partial(init_state, init_params, tx, 0, ema=True)

    with jax.set_mesh(make_mesh(MeshShape(data=2, fsdp=2, tensor=2))):
        saved = jax.jit(start)()
        # Moments that are not zero.
        saved = saved._replace(opt_state=jax.tree.map(lambda x: x + 3, saved.opt_state))
        checkpointer = Checkpointer(workdir, RUN)
        checkpointer.save(1, saved, {"examples_seen": 8})
        checkpointer.close()
    with jax.set_mesh(make_mesh(MeshShape(fsdp=4, tensor=1, data=2))):
        abstract = jax.eval_shape(start)
        step, restored, _ = Checkpointer(workdir, RUN).restore_latest(abstract)
        jax.eval_shape(tx.update, restored.params, restored.opt_state, restored.params)
    assert step == 1
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for old, new, shaped in zip(*map(jax.tree.leaves, (saved, restored, abstract)), strict=True):
        if not jax.dtypes.issubdtype(old.dtype, jax.dtypes.prng_key):
            assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
        assert new.dtype == shaped.dtype
        assert jax.typeof(new).sharding.spec == shaped.sharding.spec
