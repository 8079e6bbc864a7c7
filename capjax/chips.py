"""What a chip is: its peak rates, its memory and its networks, as its maker states them.

Sources: the pages "TPU v4" to "TPU7x" of Google Cloud's documentation, Jouppi et al., "TPU v4: An
Optically Reconfigurable Supercomputer" (2023), and NVIDIA's data sheets. A rate is decimal (1e9
bytes a second is a GB/s) and a peak: no program reaches it.
"""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip (of some TPUs JAX makes two devices: v4 unfused and tpu7x).

    Attributes:
      name: ours, such as "v5e".
      device_kinds: what JAX calls its devices (`device.device_kind`). Exact names: slices of a card
        and NVL cards are slower, and unknown here.
      peak_flops: dense bfloat16 FLOP/s.
      memory_bytes: of HBM, what a program may use. Of TPUs that is what libtpu 0.0.42 compiles for,
        a little under the chip's capacity; of GPUs the data sheet's gigabytes, a little under what
        the driver reports.
      memory_bandwidth: bytes a second, of HBM.
      link_bandwidth: bytes a second that leave the chip over the fast network (ICI, NVLink) in one
        direction, all links together. Makers state both directions: this is half of that.
      network_bandwidth: bytes a second that leave the chip over the slow network (data centre,
        InfiniBand) in one direction.
      num_axes: of the torus that the fast network is; 0: a switch.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    num_axes: int


_ALL = (
    Chip(
        "v4",
        ("TPU v4",),
        peak_flops=275e12,
        memory_bytes=int(30.5 * _GIB),  # of 32 GiB
        memory_bandwidth=1228e9,
        link_bandwidth=300e9,  # six links of 50 GB/s
        network_bandwidth=3.125e9,  # not stated: taken as of v5e
        num_axes=3,
    ),
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        peak_flops=197e12,
        memory_bytes=int(15.75 * _GIB),  # of 16 GiB
        memory_bandwidth=819e9,
        link_bandwidth=200e9,
        network_bandwidth=3.125e9,  # two cards of 100 Gbit/s to a host of eight chips
        num_axes=2,
    ),
    Chip(
        "v5p",
        ("TPU v5", "TPU v5p"),
        peak_flops=459e12,
        memory_bytes=int(95.74 * _GIB),
        memory_bandwidth=2765e9,
        link_bandwidth=600e9,
        network_bandwidth=6.25e9,
        num_axes=3,
    ),
    Chip(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        peak_flops=918e12,
        memory_bytes=int(31.25 * _GIB),  # of 32 GiB
        memory_bandwidth=1638e9,
        link_bandwidth=400e9,
        network_bandwidth=12.5e9,
        num_axes=2,
    ),
    Chip(
        "tpu7x",
        ("TPU7x",),
        peak_flops=2307e12,
        memory_bytes=int(189.5 * _GIB),  # of 192 GiB
        memory_bandwidth=7380e9,
        link_bandwidth=600e9,
        network_bandwidth=12.5e9,
        num_axes=3,
    ),
    # The network of a GPU is that of NVIDIA's own systems: a card of 200 Gbit/s for each A100,
    # of 400 Gbit/s from the H100 on.
    Chip(
        "a100-40gb",
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        peak_flops=312e12,
        memory_bytes=40 * 10**9,
        memory_bandwidth=1555e9,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
        num_axes=0,
    ),
    Chip(
        "a100-80gb",
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        peak_flops=312e12,
        memory_bytes=80 * 10**9,
        memory_bandwidth=2039e9,  # the PCIe card has 1935e9
        link_bandwidth=300e9,
        network_bandwidth=25e9,
        num_axes=0,
    ),
    Chip(
        "h100",
        ("NVIDIA H100 80GB HBM3",),  # SXM: the PCIe card is slower, and another name
        peak_flops=989e12,
        memory_bytes=80 * 10**9,
        memory_bandwidth=3350e9,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        num_axes=0,
    ),
    Chip(
        "h200",
        ("NVIDIA H200",),
        peak_flops=989e12,
        memory_bytes=141 * 10**9,
        memory_bandwidth=4800e9,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        num_axes=0,
    ),
    Chip(
        "b200",
        ("NVIDIA B200",),
        peak_flops=2250e12,
        memory_bytes=180 * 10**9,  # of 192
        memory_bandwidth=8000e9,
        link_bandwidth=900e9,
        network_bandwidth=50e9,
        num_axes=0,
    ),
)

CHIPS = {chip.name: chip for chip in _ALL}

_BY_KIND = {kind: chip for chip in _ALL for kind in chip.device_kinds}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None for one unknown here (a CPU is)."""
    return _BY_KIND.get(device_kind)
