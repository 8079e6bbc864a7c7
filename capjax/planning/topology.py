"""The machines of a plan, by a name such as "v5e:8x8", and the devices that they would show."""

import math
import os
import re
from typing import Any, NamedTuple

from capjax.chips import CHIPS, Chip
from capjax.errors import UserError, did_you_mean

GPUS_A_NODE = 8

# What libtpu wants to know of the machine it runs on, which is none. `prepare` sets it.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
_HOW = "write it as v5e:8x8, v5p:4x4x8, two slices as 2*v5e:8x8, GPUs as h100:64"


class Topology(NamedTuple):
    """Chips and how they are joined: a grid of `shape` in each slice, or so many GPUs."""

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int

    @property
    def num_chips(self) -> int:
        """In all slices."""
        return self.num_slices * math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        """Whether its programs can be compiled here."""
        return self.chip.num_axes > 0

    def device_memory(self, num_devices: int) -> int:
        """Bytes of one of so many devices: of a chip, or of the half that JAX shows of some."""
        return self.chip.memory_bytes * self.num_chips // num_devices

    def __str__(self) -> str:
        slices = f"{self.num_slices}*" if self.num_slices > 1 else ""
        return f"{slices}{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """The topology that `text` names. Raises `UserError`."""
    found = re.fullmatch(r"(?:(\d+)\*)?([\w\-]+):(\d+(?:x\d+)*)", text.strip())
    if found is None:
        raise UserError(f"--topology={text}: {_HOW}")
    slices, name, shape = int(found[1] or 1), found[2], tuple(map(int, found[3].split("x")))
    if name not in CHIPS:
        raise UserError(
            f"--topology={text}: no chip {name!r}{did_you_mean(name, CHIPS)} "
            f"(chips: {', '.join(CHIPS)})"
        )
    chip = CHIPS[name]
    if min(slices, *shape) < 1:
        raise UserError(f"--topology={text}: expected sizes of 1 or more")
    if chip.num_axes == 0 and (len(shape) > 1 or slices > 1):
        raise UserError(f"--topology={text}: give the number of GPUs alone, as in {name}:64")
    if chip.num_axes and len(shape) != chip.num_axes:
        example = "x".join("4" * chip.num_axes)
        raise UserError(
            f"--topology={text}: a slice of {name} has {chip.num_axes} axes, as in {name}:{example}"
        )
    return Topology(chip, shape, slices)


def prepare(topology: Topology) -> None:
    """Sets JAX up to plan for `topology` on this machine's CPU. Call before JAX is imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import jax

    jax.config.update("jax_platforms", "cpu")
    # JAX writes programs for absent devices to its cache, but cannot read them from there.
    jax.config.update("jax_enable_compilation_cache", False)
    if not topology.is_tpu:  # traced for as many devices, of which none computes
        jax.config.update("jax_num_cpu_devices", topology.num_chips)


def planned_devices(topology: Topology) -> list[Any]:
    """Devices to make a mesh of: those of TPUs that are not here, or stand-ins for GPUs."""
    if topology.is_tpu:
        return tpu_devices(topology)
    import jax

    return jax.devices("cpu")[: topology.num_chips]


def tpu_devices(topology: Topology) -> list[Any]:
    """The devices that JAX would show, to compile for. Raises `UserError` without libtpu."""
    from jax.experimental import topologies

    # A slice of less than a host's four chips is a part of one.
    host = [min(size, 2) for size in topology.shape[:2]] + [1]
    options = {"num_slices": topology.num_slices} if topology.num_slices > 1 else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}",
            chips_per_host_bounds=host,
            **options,
        )
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        if "not installed" in why:
            raise UserError(
                f"--topology={topology}: compiling for a TPU needs its compiler, libtpu; "
                f"pip install 'capjax[plan]' ({why})"
            ) from error
        raise UserError(f"--topology={topology}: no such slice ({why})") from error
    return list(described.devices)
