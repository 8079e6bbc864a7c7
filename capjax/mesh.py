"""The mesh, every sharding by the name of what it shards, and placing data on it.

Axes, all of explicit type (a wrong sharding fails at trace time):

    replica  copies of the model over the slow network (DCN)
    data     copies of the model over the fast network
    fsdp     parameters and optimizer state split; gathered a layer at a time where they are used
    tensor   heads and hidden units split

The batch is split over `replica`, `data` and `fsdp` together. Without a mesh (`jax.set_mesh` not
entered) every helper here is the identity, so the models run as plain JAX too.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from capjax.errors import UserError

AXES = ("replica", "data", "fsdp", "tensor")
BATCH = ("replica", "data", "fsdp")

# Activations.
act_B = P(BATCH)
act_BL = P(BATCH, None)
act_BD = P(BATCH, None)
act_BLD = P(BATCH, None, None)
act_BLF = P(BATCH, None, "tensor")
act_BLNK = P(BATCH, None, "tensor", None)
act_BLV = P(BATCH, None, "tensor")
act_BSV = P(BATCH, None, None)
act_BHWC = P(BATCH, None, None, None)
act_BNRLK = P(BATCH, "tensor", None, None, None)

# Parameters as stored. A stack's leading layer axis is prepended as None by the stack.
kernel_DF = P("fsdp", "tensor")
kernel_FD = P("tensor", "fsdp")
kernel_DNK = P("fsdp", "tensor", None)
kernel_NKD = P("tensor", None, "fsdp")
kernel_DN3K = P("fsdp", "tensor", None, None)
kernel_DV = P("fsdp", "tensor")
kernel_HWCD = P(None, None, None, "fsdp")
embedding_VD = P("tensor", "fsdp")
embedding_LD = P(None, "fsdp")
bias_V = P("tensor")
replicated = P()


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; one of them may be -1: what is left."""

    replica: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def resolve(self, num_devices: int) -> tuple[int, ...]:
        """Sizes in the order of `AXES`; `UserError` where their product is another number."""
        sizes = [getattr(self, axis) for axis in AXES]
        for axis, size in zip(AXES, sizes, strict=True):
            if size != -1 and size < 1:
                raise UserError(f"mesh.{axis}={size}: expected a positive size, or -1 for the rest")
        if sizes.count(-1) > 1:
            raise UserError(f"mesh={dict(zip(AXES, sizes, strict=True))}: only one axis may be -1")
        known = math.prod(size for size in sizes if size != -1)
        if (num_devices % known if -1 in sizes else known != num_devices) != 0:
            raise UserError(
                f"mesh={dict(zip(AXES, sizes, strict=True))} needs a multiple of {known} devices, "
                f"but there are {num_devices}; set one axis to -1 or change the sizes"
            )
        return tuple(num_devices // known if size == -1 else size for size in sizes)


def make_mesh(shape: MeshShape = MeshShape(), devices: list | None = None) -> Mesh:
    """The mesh over `devices` (default: all). Raises `UserError` where the shape does not fit.

    Several slices of TPUs, which the slow network joins, follow each other along `replica`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = shape.resolve(len(devices))
    slices = by_slice(devices)
    if sizes[0] % len(slices):
        raise UserError(
            f"mesh.replica={sizes[0]} is not a multiple of the {len(slices)} slices of TPUs; "
            f"set it to {len(slices)}, so that only copies of the model talk over the slow network"
        )
    types = (AxisType.Explicit,) * len(AXES)
    within = (sizes[0] // len(slices), *sizes[1:])
    parts = [jax.make_mesh(within, AXES, axis_types=types, devices=part) for part in slices]
    return Mesh(np.concatenate([part.devices for part in parts]), AXES, axis_types=types)


def by_slice(devices: list) -> list[list]:
    """The devices of each slice of TPUs; all of them as one where there are no slices."""
    found: dict[int, list] = {}
    for device in devices:
        # GPUs have such a number too, one a host, whatever joins the hosts.
        number = getattr(device, "slice_index", None) if device.platform == "tpu" else None
        found.setdefault(number or 0, []).append(device)
    return [found[number] for number in sorted(found)]


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch_size(batch_size: int, mesh: Mesh, name: str = "batch_size") -> None:
    """Raises `UserError` unless the batch divides over the mesh and over the processes."""
    shards = num_batch_shards(mesh)
    if batch_size < 1 or batch_size % shards:
        below = batch_size // shards * shards
        raise UserError(
            f"{name}={batch_size} does not divide over the {shards} batch shards of the mesh "
            f"{dict(mesh.shape)}; use {max(below, shards)} or {below + shards}"
        )


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh's devices, or without a mesh the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def out_sharding(spec: P) -> P | None:
    """`spec` for an `out_sharding=` argument, or None where no mesh is set."""
    return None if jax.sharding.get_abstract_mesh().empty else spec


def reshard(x: jax.Array, spec: P) -> jax.Array:
    """`x` laid out as `spec`: gathers a parameter where it is used, or splits an activation."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec)


def check_divides(tree, specs) -> None:
    """Raises `UserError` where an array's axis does not divide over its mesh axis."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    for path, x in jax.tree.leaves_with_path(tree):
        spec = functools.reduce(lambda node, key: node[key.key], path, specs)
        for size, axis in zip(x.shape, spec, strict=False):
            if axis is not None and size % sizes.get(axis, 1):
                raise UserError(
                    f"mesh.{axis}={sizes[axis]} does not divide an axis of size {size} of "
                    f"{jax.tree_util.keystr(path, simple=True, separator='/')} {x.shape}; "
                    f"use a divisor of {size}, or change the model's sizes"
                )


def gathered(spec: P) -> P:
    """How a parameter stored as `spec` is laid out where it is used: not split over `fsdp`."""
    return P(*(None if axis == "fsdp" else axis for axis in spec))


def place_batch(mesh: Mesh, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays, split over the batch axes, from this process's rows of the global batch."""
    # A transfer that is asked for; with several processes JAX's guard takes it for one that is not.
    with jax.transfer_guard("allow"):
        return {
            name: jax.make_array_from_process_local_data(
                NamedSharding(mesh, P(BATCH, *(None,) * (x.ndim - 1))), np.asarray(x)
            )
            for name, x in rows.items()
        }


def place_tree(mesh: Mesh, tree, specs):
    """`tree` on the mesh, leaf by leaf as `specs` (a tree of PartitionSpecs) says.

    Of several processes each holds the whole of it.
    """

    def place(x, spec: P) -> jax.Array:
        sharding = NamedSharding(mesh, spec)
        if mesh.size == 1:
            return jax.device_put(x, sharding)
        host = np.asarray(x)  # from device to device JAX would compile a program for each shape
        if sharding.is_fully_addressable:
            return jax.device_put(host, sharding)
        return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

    return jax.tree.map(place, tree, specs)
