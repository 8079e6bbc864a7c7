"""The least time that a step can take, from data-sheet rates: a bound, not a prediction."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from capjax.planning.hlo import Collective
from capjax.planning.topology import GPUS_A_NODE, Topology


class Network(NamedTuple):
    """What crosses a set of mesh axes in a step, and the rate at which it can.

    Attributes:
      axes: of the mesh.
      is_permute: whether each device sends to one other only, over one link of a torus.
      is_slow: whether slices (or nodes of GPUs) are joined by the data centre's network there.
      traffic: bytes that leave one device.
      bandwidth: bytes a second that one device can send.
    """

    axes: tuple[str, ...]
    is_permute: bool
    is_slow: bool
    traffic: float
    bandwidth: float

    @property
    def seconds(self) -> float:
        """At that rate."""
        return self.traffic / self.bandwidth


class Roofline(NamedTuple):
    """The parts of a step, in seconds, each at its data-sheet rate.

    Attributes:
      compute: products of matrices, what is computed again included, at the peak.
      memory: bytes moved to and from the memory, at its bandwidth; 0 where that is not known.
      networks: collectives, by mesh axes.
      ideal: the model's FLOPs alone at the peak, by which the MFU is counted.
    """

    compute: float
    memory: float
    networks: tuple[Network, ...]
    ideal: float

    @property
    def overlapped(self) -> float:
        """Seconds of a step if all that can be is hidden behind the longest part."""
        return max(self.compute, self.memory, *(self._busy(is_slow) for is_slow in (False, True)))

    @property
    def sequential(self) -> float:
        """Seconds of a step if no network is: what computes still reads and writes meanwhile."""
        return max(self.compute, self.memory) + self._busy(False) + self._busy(True)

    def _busy(self, is_slow: bool) -> float:
        """Seconds that one of the two networks works; mesh axes may share its links."""
        return sum((x.seconds for x in self.networks if x.is_slow == is_slow), 0.0)


def roofline(
    topology: Topology,
    mesh: Mesh,
    *,
    hardware_flops: float,
    model_flops: float,
    bytes_moved: float,
    collectives: Collection[Collective],
) -> Roofline:
    """`model_flops` of one step on all devices; all else of one."""
    devices_a_chip = mesh.size / topology.num_chips
    peak = topology.chip.peak_flops / devices_a_chip
    traffic: dict[tuple[tuple[str, ...], bool], float] = {}
    for one in collectives:
        key = one.axes, one.kind == "collective-permute"
        traffic[key] = traffic.get(key, 0.0) + one.traffic
    networks = [_network(topology, mesh, *key, sent) for key, sent in traffic.items()]
    return Roofline(
        compute=hardware_flops / peak,
        memory=bytes_moved * devices_a_chip / topology.chip.memory_bandwidth,
        networks=tuple(sorted(networks, key=lambda network: -network.seconds)),
        ideal=model_flops / (topology.chip.peak_flops * topology.num_chips),
    )


def _network(
    topology: Topology, mesh: Mesh, axes: tuple[str, ...], is_permute: bool, traffic: float
) -> Network:
    chip, devices_a_chip = topology.chip, mesh.size / topology.num_chips
    group = _group(mesh, axes)
    if topology.is_tpu:
        is_slow = len({getattr(device, "slice_index", None) for device in group}) > 1
        coordinates = zip(*(device.coords for device in group), strict=True)
        used = sum(len(set(values)) > 1 for values in coordinates)
        if is_permute:
            used = min(used, 0.5)  # one of an axis's two links
        fast = chip.link_bandwidth * min(used, chip.num_axes) / chip.num_axes
    else:
        is_slow = len({device.id // GPUS_A_NODE for device in group}) > 1
        fast = chip.link_bandwidth
    # Within one chip (v4 and 7x have two devices) no link is used; its memory bounds it.
    fast = fast or chip.memory_bandwidth
    bandwidth = chip.network_bandwidth if is_slow else fast
    return Network(axes, is_permute, is_slow, traffic, bandwidth / devices_a_chip)


def _group(mesh: Mesh, axes: Sequence[str]) -> list[Any]:
    """The devices that take part together with the first one along `axes`."""
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    return list(mesh.devices[index].ravel())


def totals(collectives: Collection[Collective]) -> list[Mapping[str, Any]]:
    """By kind and axes: calls, and bytes that leave one device, the largest first."""
    rows: dict[tuple, dict[str, Any]] = {}
    for one in collectives:
        row = rows.setdefault(
            (one.kind, one.axes),
            {"kind": one.kind, "axes": list(one.axes), "calls": 0, "traffic": 0.0},
        )
        row["calls"] += one.calls
        row["traffic"] += one.traffic
    return sorted(rows.values(), key=lambda row: -row["traffic"])
