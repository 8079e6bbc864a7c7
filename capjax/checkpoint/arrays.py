"""The arrays of a checkpoint: how they are named, laid out, read back and compared."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import AbstractMesh, NamedSharding, Sharding, SingleDeviceSharding

from capjax.checkpoint.digest import digest_lanes, to_hex
from capjax.checkpoint.files import STATE, Damage, first_of, quiet_orbax, unreadable
from capjax.dims import Array
from capjax.errors import UserError
from capjax.training.patterns import nested
from capjax.training.storage import patiently


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by their paths: `params/decoder/bias`, `opt_state/0/mu/...`.

    A typed PRNG key is named for its data, which is what is stored: `key` -> `key_data`.
    """
    leaves = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        name = f"{name}_data" if is_key(leaf) else name
        if name in leaves:
            raise ValueError(f"two leaves of the state are named {name}")
        leaves[name] = leaf
    return leaves


def is_key(leaf: Any) -> bool:
    """Whether `leaf` is a typed PRNG key, concrete or abstract."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def stored_data(leaf: Array) -> Array:
    """What is stored of a leaf: itself, or a PRNG key's data."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _stored_shape(leaf: Any) -> Any:
    """The same of an abstract leaf. (Tracing is slow: only a key needs it.)"""
    return jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf


def wrap_keys(arrays: Mapping[str, Array], entries: Mapping[str, Any]) -> dict[str, Array]:
    """The inverse of `stored_data`, by what the metadata says of each array."""
    return {
        name: jax.random.wrap_key_data(x, impl=entries[name]["key_impl"])
        if "key_impl" in entries[name]
        else x
        for name, x in arrays.items()
    }


def array_entry(leaf: Any) -> dict[str, Any]:
    """What the metadata says of a leaf, concrete or abstract, besides its digest."""
    data = _stored_shape(leaf)
    entry = {"shape": list(data.shape), "dtype": str(data.dtype)}
    if is_key(leaf):
        entry["key"] = str(leaf.dtype)
        if isinstance(leaf, Array):
            entry["key_impl"] = str(jax.random.key_impl(leaf))
    return entry


def check_fit(directory: epath.Path, entries: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Raises `UserError` naming the leaves that `directory` has and `leaves` lacks, and so on."""
    here = {name: array_entry(leaf) for name, leaf in leaves.items()}
    differences = [f"{name} only in the checkpoint" for name in entries if name not in here]
    differences += [f"{name} only in this run" for name in here if name not in entries]
    for name in entries.keys() & here.keys():
        a, b = _kind(entries[name]), _kind(here[name])
        if a != b:
            differences.append(f"{name} is {a} in the checkpoint and {b} in this run")
    if differences:
        shown = "; ".join(sorted(differences)[:4])
        more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise UserError(
            f"{directory} does not fit this run: {shown}{more}; use the config that it was "
            "trained with, or another workdir"
        )


def _kind(entry: Mapping[str, Any]) -> str:
    key = f" of {entry['key']}" if "key" in entry else ""
    return f"{entry['dtype']}[{','.join(map(str, entry['shape']))}]{key}"


def stored_struct(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding with which a leaf's stored data is to be restored."""
    data = _stored_shape(leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=_concrete_sharding(leaf))


def _concrete_sharding(leaf: Any) -> Sharding:
    """The leaf's own; of a result of `jax.eval_shape` its spec, on the mesh that is set."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        mesh = jax.sharding.get_mesh()
        sharding = None if mesh.empty else NamedSharding(mesh, sharding.spec)
    return sharding or SingleDeviceSharding(jax.local_devices()[0])


def stored_bytes(tree: Any) -> int:
    """Size of a state's stored arrays."""
    structs = [_stored_shape(leaf) for leaf in jax.tree.leaves(tree)]
    return sum(struct.size * struct.dtype.itemsize for struct in structs)


def on_one_device(entries: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Stored arrays, by their entries in the metadata, as they are restored to the first device."""
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(entry["shape"], np.dtype(entry["dtype"]), sharding=sharding)
        for name, entry in entries.items()
    }


def state_handler() -> ocp.PyTreeCheckpointHandler:
    """How `state/` is written and read.

    Few large files (OCDBT) instead of one or more for each array; not compressed, as weights hardly
    shrink and zstd doubles the time.
    """
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)


def read_arrays(
    directory: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Array]:
    """The stored arrays named in `wanted`, in its order. Raises `Damage` with Orbax's complaint.

    Storage that fails for a while is waited for; `StorageError` where it is too long.
    """
    quiet_orbax()
    item = nested(wanted)
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    place = directory / STATE
    try:
        tree = patiently(lambda: state_handler().restore(place, args=args), f"reading {place}")
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # this machine's trouble, not the checkpoint's
    except Exception as error:  # KeyError, JSONDecodeError, ValueError, ...: as the bytes fall
        raise unreadable(place, f"{STATE}/", error) from error
    restored = named_leaves(tree)
    for name in wanted:  # Orbax leaves an array that it does not know as it was asked for
        if not isinstance(restored.get(name), Array):
            raise Damage(f"{STATE}/ lacks {name}")
    return {name: restored[name] for name in wanted}


def digest_problems(arrays: Mapping[str, Array], entries: Mapping[str, Any]) -> list[str]:
    """Arrays that are not bit for bit what was saved."""
    found = to_hex(digest_lanes(arrays))
    return [f"array {k} is not what was saved" for k in found if found[k] != entries[k]["digest"]]


def check_digests(arrays: Mapping[str, Array], entries: Mapping[str, Any]) -> None:
    """Raises `Damage` unless all arrays are what was saved."""
    problems = digest_problems(arrays, entries)
    if problems:
        raise Damage(first_of(problems))
