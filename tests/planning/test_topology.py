"""Names of topologies; slices of TPUs lie along the mesh axis of the slow network."""

import types

import jax
import pytest

from capjax.chips import CHIPS
from capjax.errors import UserError
from capjax.mesh import MeshShape, by_slice, make_mesh
from capjax.planning.topology import parse_topology, tpu_devices


@pytest.mark.parametrize(
    ("text", "chip", "num_chips", "num_slices"),
    [
        ("v5e:8x8", "v5e", 64, 1),
        ("v5p:4x4x8", "v5p", 128, 1),
        ("2*v6e:16x16", "v6e", 512, 2),
        ("h100:64", "h100", 64, 1),
        ("a100-80gb:8", "a100-80gb", 8, 1),
    ],
)
def test_names(text, chip, num_chips, num_slices):
    topology = parse_topology(text)
    assert topology.chip is CHIPS[chip]
    assert (topology.num_chips, topology.num_slices) == (num_chips, num_slices)
    assert str(topology) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5e", "write it as"),
        ("v5x:8x8", "did you mean"),
        ("v5e:8", "2 axes"),
        ("v5p:8x8", "3 axes"),
        ("v5e:0x8", "1 or more"),
        ("0*v5e:4x4", "1 or more"),
        ("h100:8x8", "h100:64"),
    ],
)
def test_names_that_mean_nothing(text, words):
    with pytest.raises(UserError, match=r"--topology=") as caught:
        parse_topology(text)
    assert words in str(caught.value)


def device(number, slice_index, platform="tpu"):
    return types.SimpleNamespace(id=number, slice_index=slice_index, platform=platform)


def test_devices_by_slice():
    devices = [device(i, i % 2) for i in range(6)]
    assert [[d.id for d in part] for part in by_slice(devices)] == [[0, 2, 4], [1, 3, 5]]
    assert len(by_slice([device(i, None) for i in range(4)])) == 1
    assert len(by_slice([device(i, i, "gpu") for i in range(4)])) == 1  # a number a host
    assert len(by_slice(jax.devices())) == 1


def test_slices_need_the_replica_axis():
    with pytest.raises(UserError, match=r"mesh.replica=1 .* 2 slices"):
        make_mesh(MeshShape(), [device(i, i // 2) for i in range(4)])


@pytest.fixture
def libtpu(monkeypatch):
    """Its compiler, without a TPU."""
    pytest.importorskip("libtpu", reason="needs libtpu (pip install 'capjax[plan]')")
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("libtpu")
def test_two_slices_make_two_replicas():
    devices = tpu_devices(parse_topology("2*v5e:2x2"))
    mesh = make_mesh(MeshShape(replica=4, data=1, fsdp=2), devices)
    slices = [[d.slice_index for d in copy.ravel()] for copy in mesh.devices]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_without_libtpu_the_error_names_the_extra():
    try:
        import libtpu  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'capjax\[plan\]'"):
            tpu_devices(parse_topology("v5e:4x4"))
