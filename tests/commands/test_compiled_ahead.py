"""The training step compiles in a thread, on its mesh, and is the step that was asked for."""

import contextlib
import gc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from capjax.commands.runtime import rarer_collections
from capjax.commands.train import compiled_ahead
from capjax.mesh import MeshShape, make_mesh


def plan_of(function, total_steps: int = 3) -> SimpleNamespace:
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    kind = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    return SimpleNamespace(
        mesh=mesh,
        total_steps=total_steps,
        train_step=jax.jit(function, donate_argnums=0),
        abstract_inputs=lambda: (kind, kind),
        stage=None,
    )


def test_what_is_compiled_ahead_is_the_step_and_takes_nothing_else(tmp_path):
    plan = plan_of(lambda state, batch: (state + batch, jnp.sum(batch)))
    with contextlib.ExitStack() as stack, jax.set_mesh(plan.mesh):
        step = compiled_ahead(plan, epath.Path(tmp_path), stack)
        state, batch = (
            jax.device_put(np.full(4, x, np.float32), NamedSharding(plan.mesh, P("data")))
            for x in (1, 2)
        )
        after, total = step(state, batch)
        np.testing.assert_array_equal(after, np.full(4, 3.0))
        assert float(total) == 8
        assert state.is_deleted()  # given up, as by the step itself
        with pytest.raises(TypeError):
            step(after[:2], batch[:2])  # another shape: it does not compile anew


def test_what_tracing_raises_comes_with_the_first_call(tmp_path):
    def refused(state, batch):
        raise ValueError("no such step")

    plan = plan_of(refused)
    with contextlib.ExitStack() as stack:
        step = compiled_ahead(plan, epath.Path(tmp_path), stack)
        with pytest.raises(ValueError, match="no such step"):
            step(None, None)


def test_a_run_that_is_done_compiles_nothing(tmp_path):
    plan = plan_of(lambda state, batch: (state, batch))
    (tmp_path / "checkpoints" / "00000003").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        assert compiled_ahead(plan, epath.Path(tmp_path), stack) is plan.train_step


def test_collections_are_rarer_only_within():
    before = gc.get_threshold()
    with pytest.raises(KeyError), rarer_collections():
        assert gc.get_threshold()[0] > before[0]
        raise KeyError
    assert gc.get_threshold() == before
