"""Bounds of a step from rates: closed forms on stand-in devices."""

import jax
import pytest

from capjax.mesh import MeshShape, make_mesh
from capjax.planning.hlo import Collective
from capjax.planning.roofline import roofline, totals
from capjax.planning.topology import parse_topology


def collective(kind, axes, size, count):
    return Collective(kind, ("f32[1]",), count, size, axes, 1)


def test_bounds_of_a_node_of_gpus():
    topology = parse_topology("h100:8")
    mesh = make_mesh(MeshShape(data=2, fsdp=4), jax.devices())
    peak, link = topology.chip.peak_flops, topology.chip.link_bandwidth
    exchanges = [
        collective("all-gather", ("fsdp",), 4, 4_000_000),
        collective("all-reduce", ("data",), 2, 1_000_000),
    ]
    work = {"hardware_flops": 2e-3 * peak, "model_flops": 8e-3 * peak, "collectives": exchanges}
    found = roofline(topology, mesh, bytes_moved=1.0, **work)
    assert found.compute == pytest.approx(2e-3)
    assert found.ideal == pytest.approx(1e-3)
    sent = {network.axes: network.traffic for network in found.networks}
    assert sent == {("fsdp",): 3_000_000, ("data",): 1_000_000}
    assert not any(network.is_slow for network in found.networks)
    assert found.overlapped == pytest.approx(2e-3)
    assert found.sequential == pytest.approx(2e-3 + 4e6 / link)
    # What is read and written bounds the step where it takes longer than the products.
    found = roofline(topology, mesh, bytes_moved=3e-3 * topology.chip.memory_bandwidth, **work)
    assert found.memory == pytest.approx(3e-3)
    assert found.overlapped == pytest.approx(3e-3)
    assert found.sequential == pytest.approx(3e-3 + 4e6 / link)


def test_a_busy_network_bounds_even_what_overlaps():
    topology = parse_topology("h100:8")
    mesh = make_mesh(MeshShape(data=1, fsdp=8), jax.devices())
    exchange = collective("all-gather", ("fsdp",), 8, 8 * int(topology.chip.link_bandwidth))
    work = {"hardware_flops": 1.0, "model_flops": 8.0, "bytes_moved": 0.0}
    found = roofline(topology, mesh, collectives=[exchange], **work)
    assert found.overlapped == pytest.approx(7)
    assert found.overlapped <= found.sequential


def test_totals_add_up_by_kind_and_axes():
    one = collective("all-reduce", ("data",), 2, 100)
    rows = totals([one, one._replace(calls=3), one._replace(axes=("fsdp",))])
    assert [(row["axes"], row["calls"], row["traffic"]) for row in rows] == [
        (["data"], 4, 400.0),
        (["fsdp"], 1, 100.0),
    ]
