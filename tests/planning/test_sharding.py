"""How the state of every shipped config of paper scale lies on a mesh. Nothing is compiled."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from capjax.commands import settings
from capjax.commands.program import build_program
from capjax.mesh import MeshShape, make_mesh
from capjax.planning.sharding import Row, render, replicated_by_accident, sharding_table

CONFIGS = [name for name in settings.shipped_configs() if not name.startswith("emoji")]
OPTIMIZERS = ["adamw", "adafactor", "big_vision_adafactor", "muon"]
VOCAB_SIZE = 32_000


@functools.cache
def table(name: str, optimizer: str = "") -> list[Row]:
    mesh = make_mesh(MeshShape(data=1, fsdp=4, tensor=2))
    config = settings.load_config(
        name, (f"--config.optimizer.name={optimizer}",) if optimizer else ()
    )
    program = build_program(config, mesh, vocab_size=VOCAB_SIZE, num_examples=10**9)
    return sharding_table(program.abstract_state, mesh)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_large_is_replicated_by_accident(name):
    rows = table(name)
    assert not replicated_by_accident(rows), render(replicated_by_accident(rows))
    # So almost nothing of the state is held twice.
    assert sum(row.bytes_a_chip for row in rows) < 1.05 * sum(row.bytes for row in rows) / 4


@pytest.mark.parametrize("name", CONFIGS)
def test_optimizer_state_lies_as_its_parameters_do(name):
    check_moments(table(name))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_so_it_does_of_every_optimizer(optimizer):
    rows = table("cappa_s16", optimizer)
    assert not replicated_by_accident(rows), render(replicated_by_accident(rows))
    check_moments(rows)


def check_moments(rows: list[Row]) -> None:
    """A moment has its parameter's axes and split, but those that a mean was taken over."""
    params = {row.name.removeprefix("params/"): row for row in rows if row.name[:7] == "params/"}
    checked = 0
    for moment in (row for row in rows if row.name.startswith("opt_state/")):
        owners = [row for name, row in params.items() if moment.name.endswith(f"/{name}")]
        if not owners:
            assert moment.bytes < 100, moment  # a count, a few coefficients
            continue
        checked += 1
        param = max(owners, key=lambda row: len(row.name))
        assert len(moment.shape) == len(param.shape), moment
        for size, axis, its_size, its_axis in zip(
            moment.shape, moment.spec, param.shape, param.spec, strict=True
        ):
            assert (size, axis) in ((its_size, its_axis), (1, None)), (moment, param)
    assert checked
    for row in rows:
        if row.name.startswith("ema/"):
            param = params[row.name.removeprefix("ema/")]
            assert (row.shape, row.spec) == (param.shape, param.spec)


def test_rows_of_known_arrays():
    mesh = make_mesh(MeshShape(data=1, fsdp=4, tensor=2))

    def leaf(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    tree = {
        "params": {
            "kernel": leaf((3, 1024, 512), P(None, "fsdp", "tensor")),
            "table": leaf((1024, 512), P("tensor")),
            "batch": leaf((64,), P(("data", "fsdp")), jnp.bfloat16),
        },
        "step": leaf((), P(), jnp.int32),
    }
    rows = sharding_table(tree, mesh)
    by_name = {row.name: row for row in rows}
    kernel, batch = by_name["params/kernel"], by_name["params/batch"]
    assert (kernel.bytes, kernel.bytes_a_chip, kernel.replicated_over) == (6 * 2**20, 786432, ())
    assert (batch.bytes, batch.bytes_a_chip, batch.replicated_over) == (128, 32, ("tensor",))
    assert by_name["step"].replicated_over == ("fsdp", "tensor")
    assert [row.name for row in replicated_by_accident(rows)] == ["params/table"]
    assert not replicated_by_accident(rows, limit=2**21)
    lines = render(rows).splitlines()
    assert lines[2].split() == (
        ["params/kernel", "float32[3,1024,512]", "-", "fsdp", "tensor", "6.000", "0.750", "-"]
    )
    assert lines[-2].split() == ["params", "in", "all", "8.000", "1.750"]
