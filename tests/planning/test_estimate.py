"""Memory of a step: exact parts, XLA's own analysis, and the estimate without a compile."""

import jax
import jax.numpy as jnp
import pytest

from capjax.commands.program import build_mesh, build_program
from capjax.commands.settings import load_config
from capjax.planning.estimate import (
    argument_memory,
    bytes_wanted,
    compiled_memory,
    estimated_memory,
    live_bytes,
)

FACTOR = 1.6  # XLA fuses what the estimate holds, and adds copies and layouts


@pytest.fixture(scope="module")
def traced():
    """A step of the smallest model over 8 devices, and what it takes."""
    config = load_config(
        "emoji_quickstart",
        ["model.depth=3", "batch_size=64", "mesh.data=2", "mesh.fsdp=4", "optimizer.ema_decay=0.9"],
    )
    mesh = build_mesh(config)
    program = build_program(config, mesh, vocab_size=512)
    inputs = program.abstract_inputs()
    with jax.set_mesh(mesh):
        return program.train_step.trace(*inputs), inputs


def test_the_arguments_are_exact(traced):
    _, (state, batch) = traced
    memory = argument_memory(state, batch)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    # Kernels are split four ways over fsdp; biases and norms are not.
    assert whole / 4 < memory.parameters < whole / 3
    assert memory.average == memory.parameters
    assert abs(memory.optimizer - 2 * memory.parameters) < 100  # Adam's moments and a count
    assert memory.batch == sum(x.size * x.dtype.itemsize for x in batch.values()) // 8


def test_the_estimate_is_near_what_xla_allots(traced):
    step, (state, batch) = traced
    estimated = estimated_memory(step.jaxpr, state, batch)
    compiled = compiled_memory(step.lower().compile(), state, batch)
    assert compiled.parameters == estimated.parameters
    assert compiled.padding < 4096
    assert 1 / FACTOR < compiled.temporaries / estimated.temporaries < FACTOR


def test_live_bytes_of_a_chain_and_of_what_is_kept():
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)

    def chain(x):
        for _ in range(10):
            x = x @ x
        return x

    def kept(x):
        return [y := x @ x, z := y @ y, z @ z]

    assert live_bytes(jax.jit(chain).trace(x).jaxpr.jaxpr) == 2 * 256  # an operand and a result
    assert live_bytes(jax.jit(kept).trace(x).jaxpr.jaxpr) == 3 * 256


def test_what_a_compiler_says_of_too_large_a_program():
    everything = "Ran out of memory in memory space hbm. Used 18.27G of 15.75G hbm. Exceeded hbm"
    temporaries = (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (232.72G) exceeds "
        "available HBM (15.75G)."
    )
    assert bytes_wanted(everything, 1000) == round(18.27 * 2**30)
    assert bytes_wanted(temporaries, 1000) == 1000 + round(232.72 * 2**30)
    assert bytes_wanted("something else", 1000) is None
