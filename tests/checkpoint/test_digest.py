"""The digest equals its definition, does not see the mesh, and sees every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from capjax.checkpoint.digest import digest_lanes, params_digest, to_hex
from capjax.mesh import bias_V, kernel_DF, place_tree

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def mix(x: int, a: int, first: int, b: int, second: int, c: int) -> int:
    x = (x ^ (x >> a)) * first % 2**32
    x = (x ^ (x >> b)) * second % 2**32
    return x ^ (x >> c)


def reference(array: np.ndarray) -> str:
    """The definition, in Python's integers."""
    lanes = [0, 0]
    words = np.ascontiguousarray(array).reshape(-1).view(WORDS[array.dtype.itemsize])
    for index, word in enumerate(words.tolist()):
        murmur3 = (16, 0x85EBCA6B, 13, 0xC2B2AE35, 16)
        lowbias32 = (16, 0x7FEB352D, 15, 0x846CA68B, 16)
        lanes[0] += mix(word ^ (index * 0x9E3779B1 % 2**32), *murmur3)
        lanes[1] += mix((word + mix(index, *lowbias32)) % 2**32, *lowbias32)
    return "".join(f"{lane % 2**32:08x}" for lane in lanes)


def digest(x) -> str:
    return to_hex(digest_lanes({"x": jnp.asarray(x)}))["x"]


@pytest.mark.parametrize(
    "dtype", [np.float32, jnp.bfloat16, np.float16, np.int8, np.uint32, np.bool_]
)
def test_equals_its_definition(dtype):
    array = (np.random.default_rng(0).normal(size=(3, 5, 2)) * 50).astype(dtype)
    assert digest(array) == reference(array)


def test_scalars_and_empty_arrays():
    assert digest(np.int32(7)) == reference(np.int32(7))
    assert digest(np.zeros((0, 3), np.float32)) == "0" * 16


def test_is_the_same_on_every_mesh(mesh_of):
    x = np.random.default_rng(1).normal(size=(16, 8, 3)).astype(np.float32)
    found = {digest(x)}
    for fsdp, tensor in ((2, 4), (8, 1), (1, 8), (4, 2)):
        mesh = mesh_of(fsdp, tensor)
        for spec in (P("fsdp", "tensor"), P("tensor", None), P(None, ("fsdp", "tensor")), P()):
            found.add(digest(jax.device_put(x, NamedSharding(mesh, spec))))
    assert found == {reference(x)}


def test_every_flipped_bit_changes_both_lanes():
    x = np.random.default_rng(2).normal(size=(32, 32)).astype(np.float32)
    before = digest(x)
    rng = np.random.default_rng(3)
    for _ in range(200):
        flipped = x.copy()
        flipped.view(np.uint32).reshape(-1)[rng.integers(x.size)] ^= np.uint32(
            1 << rng.integers(32)
        )
        after = digest(flipped)
        assert after[:8] != before[:8]
        assert after[8:] != before[8:]


def test_sees_what_sums_and_values_do_not():
    x = np.arange(1, 65, dtype=np.float32).reshape(8, 8)
    swapped, shifted, moved = x.copy(), np.roll(x, 1), np.zeros((8, 8), np.float32)
    swapped[0], swapped[5] = x[5], x[0]
    moved[3, 3] = 1
    elsewhere = np.roll(moved, 1)
    nan = np.full((8, 8), np.nan, np.float32)
    other_nan = (nan.view(np.uint32) ^ np.uint32(1)).view(np.float32)
    zero = np.zeros((8, 8), np.float32)
    all_of_them = [x, x.T, swapped, shifted, moved, elsewhere, nan, other_nan, zero, -zero]
    assert len({digest(a) for a in all_of_them}) == len(all_of_them)


def test_of_all_parameters_on_any_mesh(mesh_of):
    some = {"a": {"kernel": jnp.arange(16.0).reshape(4, 4)}, "b": jnp.ones(4)}
    digest = params_digest(some)
    specs = {"a": {"kernel": kernel_DF}, "b": bias_V}
    assert params_digest(place_tree(mesh_of(2, 2), some, specs)) == digest
    assert params_digest(some | {"b": some["b"].at[3].add(1e-3)}) != digest
    assert params_digest({"a": some["a"], "c": some["b"]}) != digest
