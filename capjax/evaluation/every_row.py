"""Every image of a source, or every row of an array, through a function on the devices of a mesh.

Batches are of one size, filled up with rows that are dropped again. Each process reads its own rows
of every batch, and all of them get the whole result, in the order of the source.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from capjax.data.decode import ImageError
from capjax.data.images import ImagePreprocessing
from capjax.data.records import CorruptRecord
from capjax.data.sources import Source
from capjax.decoding.inputs import compiled_size, pad_rows, read_ahead
from capjax.dims import Array
from capjax.errors import UserError
from capjax.mesh import BATCH, check_batch_size, num_batch_shards, place_batch

NO_LABEL = -1


class ImageRows(NamedTuple):
    """What was made of the images of a source, a row each, in the source's order.

    values: [N, ...]; labels_N: int32, `NO_LABEL` where the example has none; keys: the examples';
    unreadable: the number of images left out, as they cannot be decoded.
    """

    values: np.ndarray
    labels_N: np.ndarray
    keys: tuple[str, ...]
    unreadable: int


class _Read(NamedTuple):
    index: int
    pixels: np.ndarray | None  # None: nothing to see here
    label: int = NO_LABEL
    key: str = ""


def map_images(
    run: Callable[[Array], Array],
    source: Source,
    preprocessing: ImagePreprocessing,
    *,
    mesh: Mesh,
    batch_size: int = 128,
    max_examples: int | None = None,
) -> ImageRows:
    """The rows that `run` makes of all images of `source`.

    Args:
      run: uint8 [B, size, size, 3], split over the mesh -> [B, ...].
      batch_size: images at once, over all devices and processes.
      max_examples: takes that many, evenly spread; None for all.

    Raises `UserError` for a batch that does not divide over the mesh, and where no image can be
    read.
    """
    check_batch_size(batch_size, mesh)
    if max_examples is not None and max_examples < 1:
        raise UserError(f"max_examples={max_examples}: expected at least 1, or none for all")
    count = min(len(source), max_examples or len(source))
    read = functools.partial(_read, source, preprocessing, count)
    parts, keys = [], {}
    for rows in _own_rows(read, count, batch_size):
        keys |= {row.index: row.key for row in rows if row.pixels is not None}
        empty = np.zeros((preprocessing.image_size,) * 2 + (3,), np.uint8)
        batch = {
            "image": np.stack([empty if row.pixels is None else row.pixels for row in rows]),
            "index": np.array([row.index for row in rows], np.int32),
            "label": np.array([row.label for row in rows], np.int32),
            "mask": np.array([row.pixels is not None for row in rows]),
        }
        placed = place_batch(mesh, batch)
        with jax.set_mesh(mesh):
            made = run(placed["image"])
        beside = (placed["index"], placed["label"], placed["mask"])
        *gathered, mask_B = multihost_utils.process_allgather((made, *beside), tiled=True)
        parts.append([x[mask_B] for x in gathered])
    if not any(len(labels) for *_, labels in parts):
        raise UserError(f"{source!r}: none of its {count} images can be read")
    values, index_N, labels_N = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.argsort(index_N)
    keys = _texts_of_all_processes(keys)
    keys_N = tuple(keys[index] for index in index_N[order].tolist())
    return ImageRows(values[order], labels_N[order], keys_N, count - len(order))


def map_rows(
    run: Callable[[dict[str, Array]], Any],
    rows: Mapping[str, np.ndarray],
    *,
    mesh: Mesh,
    batch_size: int = 1024,
) -> Any:
    """The rows that `run` makes of arrays with one leading axis, which every process holds.

    `run` gives an array, or a tree of arrays, with rows in the order of its own.
    """
    count = len(next(iter(rows.values())))
    size = compiled_size(count, batch_size, num_batch_shards(mesh))
    outputs = []
    for start in range(0, count, size):
        part = {name: pad_rows(x[start : start + size], size) for name, x in rows.items()}
        placed = {name: place(mesh, x, P(BATCH)) for name, x in part.items()}
        with jax.set_mesh(mesh):
            made = run(placed)
        gathered = multihost_utils.process_allgather(made, tiled=True)
        outputs.append(jax.tree.map(lambda x, left=count - start: x[:left], gathered))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def place(mesh: Mesh, x: np.ndarray, spec: P) -> Array:
    """A global array, laid out as `spec`, of what every process holds whole."""
    sharding = NamedSharding(mesh, P(*spec, *(None,) * (x.ndim - len(spec))))
    with jax.transfer_guard("allow"):  # asked for
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


def _own_rows(read: Callable[[int], _Read], count: int, batch_size: int) -> Iterator[list[_Read]]:
    """This process's rows of each batch, read ahead in threads."""
    num_rows = batch_size // jax.process_count()
    first = jax.process_index() * num_rows
    positions: Iterable[int] = itertools.chain.from_iterable(
        range(start + first, start + first + num_rows) for start in range(0, count, batch_size)
    )
    rows = read_ahead(read, positions, ahead=2 * num_rows)
    while batch := list(itertools.islice(rows, num_rows)):
        yield batch


def _read(source: Source, preprocessing: ImagePreprocessing, count: int, position: int) -> _Read:
    if position >= count:
        return _Read(0, None)
    index = position * len(source) // count
    try:
        example = source[index]
        pixels = preprocessing.preprocess_bytes(example.image)
    except (CorruptRecord, ImageError):
        return _Read(index, None)
    label = NO_LABEL if example.label is None else example.label
    return _Read(index, pixels, label, example.key)


def of_all_processes(rows: np.ndarray) -> np.ndarray:
    """[N, ...]: the rows of all processes, one's after another's; each may have another number."""
    if jax.process_count() == 1:
        return rows
    counts = multihost_utils.process_allgather(np.array(len(rows), np.int32))
    if not counts.any():
        return rows
    padded = multihost_utils.process_allgather(pad_rows(rows, int(counts.max())))
    return np.concatenate([part[:count] for part, count in zip(padded, counts, strict=True)])


def _texts_of_all_processes(texts: dict[int, str]) -> dict[int, str]:
    """The entries of all processes' dicts."""
    content = json.dumps(list(texts.items())).encode() + b"\n"
    gathered = of_all_processes(np.frombuffer(content, np.uint8)).tobytes()
    return {index: text for part in gathered.splitlines() for index, text in json.loads(part)}
