"""A 64-bit digest of every array, computed where the array lives, the same on any mesh.

Storage returns flipped bits without complaint: neither zarr nor the compression under Orbax keeps
a checksum of array data. So the digest is taken of the live arrays when they are saved, and again
of the arrays that were restored: it covers the whole way to the disk and back.

    lane_k = sum over elements of mix_k(bits, index)   in uint32, wrapping

Wrapping addition is exact and commutative, so neither the layout nor the order of the reduction
matters. For a fixed index `mix_k` is a bijection of the bits, so a change confined to one element
always changes both lanes; other changes (elements moved, chunks zeroed) pass with chance 2^-64.
Constants: the finalizers of MurmurHash3 (Appleby, public domain) and "lowbias32" (Wellons, 2018,
public domain).
"""

import hashlib
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from capjax.dims import Array, Params

GOLDEN = 0x9E3779B1  # odd: multiplying by it permutes uint32
MURMUR3 = (16, 0x85EBCA6B, 13, 0xC2B2AE35, 16)
LOWBIAS32 = (16, 0x7FEB352D, 15, 0x846CA68B, 16)
# Programs launched at once. A CPU device takes 32; with more, virtual devices can wait for each
# other forever: launches that are held back occupy the threads the running programs need.
IN_FLIGHT = 8


def digest_lanes(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Name -> uint32[2], replicated. The last `IN_FLIGHT` may still be running.

    The arrays hold numbers or booleans; of a typed PRNG key pass `jax.random.key_data`. One small
    program a shape, as compiling those is quicker than compiling one large one for the whole tree.
    """
    lanes: dict[str, Array] = {}
    for name, x in arrays.items():
        with jax.set_mesh(_mesh(x)):  # arrays may lie elsewhere than on the mesh that is set
            lanes[name] = _lanes(x)
        if len(lanes) % IN_FLIGHT == 0:
            jax.block_until_ready(lanes)
    return lanes


def to_hex(lanes: Mapping[str, Array]) -> dict[str, str]:
    """Name -> 16 hexadecimal digits. Waits for the devices."""
    return {name: f"{a:08x}{b:08x}" for name, (a, b) in jax.device_get(dict(lanes)).items()}


def params_digest(params: Params) -> str:
    """Of all parameters: hexadecimal, the same on any mesh."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(params)
    }
    digests = to_hex(digest_lanes(leaves))
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _mesh(x: Array) -> Mesh:
    """The mesh of an array, or the empty one."""
    if isinstance(x.sharding, NamedSharding) and isinstance(x.sharding.mesh, Mesh):
        return x.sharding.mesh
    return Mesh(np.empty((), object), ())


@jax.jit
def _lanes(x: Array) -> Array:
    bits = _bits(x)
    index = _flat_index(bits.shape)
    first = _mix(bits ^ (index * jnp.uint32(GOLDEN)), MURMUR3)
    second = _mix(bits + _mix(index, LOWBIAS32), LOWBIAS32)
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


def _bits(x: Array) -> Array:
    """The elements' bits as uint32; 64-bit elements gain a trailing axis of two words."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)


def _flat_index(shape: tuple[int, ...]) -> Array:
    """Row-major position of every element, modulo 2^32."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        step = jnp.uint32(stride % 2**32)
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * step
        stride *= shape[axis]
    return index


def _mix(x: Array, constants: tuple[int, int, int, int, int]) -> Array:
    """Three xor-shifts and two odd multiplications: a bijection of uint32 that spreads each bit."""
    a, first, b, second, c = constants
    x = (x ^ (x >> a)) * jnp.uint32(first)
    x = (x ^ (x >> b)) * jnp.uint32(second)
    return x ^ (x >> c)
