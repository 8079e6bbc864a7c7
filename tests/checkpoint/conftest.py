"""A small training state with all kinds of leaves, laid out on any mesh."""

import subprocess
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from capjax.checkpoint import Checkpointer, RunInfo
from capjax.mesh import MeshShape, make_mesh

RUN = RunInfo(
    config={"seed": 1, "model": {"width": 8}, "styles": ["fluent"]},
    preprocessing={"image_size": 64},
    pixels_by={"resizer": "pillow"},
    data={"num_examples": 7, "sha256": "ab"},
    tokenizer_model=bytes(range(256)) * 4,
)


class TrainState(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    key: Any


def numpy_state(seed: int, large: int) -> TrainState:
    """Random values, and bits that comparisons by value miss: NaN, -0, subnormals."""
    rng = np.random.default_rng(seed)
    odd = np.array([np.nan, -0.0, 0.0, 1e-40, np.inf, -np.inf, 3, 4], np.float32)
    params = {
        "encoder": {"kernel": rng.normal(size=(8, 16)).astype(np.float32), "bias": odd},
        "decoder": {"embedding": rng.normal(size=(16, 8)).astype(jnp.bfloat16)},
    }
    if large:  # one array whose file is too large for a hash: only its digest guards it
        params["large"] = rng.normal(size=(large, 8)).astype(np.float32)
    moments = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params)
    adam = optax.ScaleByAdamState(np.int32(seed), moments, {"encoder": {"mask": odd > 0}})
    key = jax.random.split(jax.random.key(seed), 8)
    return TrainState(np.int32(10 * seed), params, (adam, optax.EmptyState()), key)


def spec(leaf) -> P:
    """Dim 0 over fsdp, dim 1 over tensor; all the test's dims divide by 8."""
    return P(*("fsdp", "tensor")[: len(leaf.shape)])


@pytest.fixture(scope="session")
def mesh_of():
    """`mesh_of(2, 4)`: fsdp=2, tensor=4, on the first 8 devices."""

    def make(fsdp: int, tensor: int, data: int = 1):
        devices = jax.devices()[: data * fsdp * tensor]
        return make_mesh(MeshShape(data=data, fsdp=fsdp, tensor=tensor), devices)

    return make


@pytest.fixture(scope="session")
def state_of():
    """`state_of(seed, mesh=None, large=0)`: a state, on the first device where no mesh is given."""

    def make(seed: int, mesh=None, large: int = 0) -> TrainState:
        state = numpy_state(seed, large)
        if mesh is None:
            return jax.tree.map(jnp.asarray, state)
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), state)

    return make


@pytest.fixture(scope="session")
def abstract():
    """The shapes, types and shardings of a state."""
    return lambda state: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def bits(tree) -> list[tuple]:
    """Everything that makes two trees equal bit for bit: paths, dtypes, shapes, bytes."""
    facts = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        data = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        name = jax.tree_util.keystr(path)
        facts.append((name, str(leaf.dtype), leaf.shape, data.shape, data.tobytes()))
    return facts


@pytest.fixture(scope="session")
def bits_of():
    """The function `bits`."""
    return bits


@pytest.fixture(scope="session")
def run_info() -> RunInfo:
    """What the checkpoints of the tests say of their run."""
    return RUN


@pytest.fixture
def open_checkpointer(tmp_path):
    """`open_checkpointer(**options)` on tmp_path/checkpoints; `.reports` are the lines it reports.

    All are closed after the test, which may leave failed saves behind.
    """
    opened = []

    def make(directory=tmp_path / "checkpoints", **options) -> Checkpointer:
        reports: list[str] = []
        checkpointer = Checkpointer(directory, RUN, report=reports.append, **options)
        checkpointer.reports = reports
        opened.append(checkpointer)
        return checkpointer

    yield make
    for checkpointer in opened:
        checkpointer.__exit__(None, RuntimeError("the test is over"), None)


@pytest.fixture
def small_disk(tmp_path):
    """A file system in memory, of 5 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs leave to mount a tmpfs")
    yield epath.Path(disk)
    subprocess.run(["umount", "-l", str(disk)], check=True)
