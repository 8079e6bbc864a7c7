"""What the formats share: tables of names, and filling our parameters from arrays by such a table.

A table says for every array of theirs where it lies in our parameters. Both directions are read
off it: `export` makes their arrays of our parameters, `fill` our parameters of their arrays.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import EllipsisType, MappingProxyType
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from capjax.dims import Params
from capjax.errors import UserError
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.coca import CoCa, CoCaConfig
from capjax.models.functional import PureModel
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.image_tower import ImageTower
from capjax.models.resize import resize_position_embedding
from capjax.models.two_towers import TwoTowers, TwoTowersConfig

FlatArrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]
Modules = Iterable[tuple[str, str, int | None]]
Index = tuple[int | slice | EllipsisType, ...]
Groups = tuple[tuple[int, ...], ...]

GEMMA_TOKENS = 256_000  # the vocabulary that tells SigLIP 2, whose texts are padded with 0

_LEAVES = ("kernel", "scale", "bias", "embedding")


class Leaf(NamedTuple):
    """Where one array of theirs lies in our parameters.

    Attributes:
      path: ours, such as "encoder/blocks/attention/qkv/kernel".
      index: the part of it, a view: a layer, one of the kernels that we keep side by side, the rows
        of a vocabulary that are in use.
      groups: for each axis of theirs the axes of that part which it joins, in their order; an empty
        group is an axis of length 1. ((1, 2), (0,)) makes torch's (N * K, D) of our (D, N, K).
        None: the same axes.
    """

    path: str
    index: Index = (...,)
    groups: Groups | None = None


Table = dict[str, Leaf]  # by their name


class Weights(NamedTuple):
    """What a format's `read` finds, and its `write` takes.

    Attributes:
      model: "captioner", "two_towers" or "image_encoder": what `config` and `params` are of.
      params: float32, on the host; of an image encoder {"encoder"} and perhaps {"image_head"}.
      notes: a line for each thing that was left out or changed on the way.
      preprocessing: fields of `data.images.ImagePreprocessing` that the files tell.
      tokenizer_model: of a `data.tokenizer.Tokenizer`, where the files have one.
    """

    model: str
    config: ImageEncoderConfig
    params: Params
    notes: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = MappingProxyType({})
    tokenizer_model: bytes = b""


def model_of(config: ImageEncoderConfig) -> PureModel:
    """The model of a configuration, by its class."""
    match config:
        case CaptionerConfig():
            return Captioner(config)
        case TwoTowersConfig():
            return TwoTowers(config)
        case CoCaConfig():
            return CoCa(config)
    return ImageTower(config)


def resized(weights: Weights, image_size: int) -> Weights:
    """The same for images of another size, position embeddings interpolated if they are learned.

    Of a size that is no multiple of the patch's, what the patches do not reach is dropped.
    """
    old, patch = weights.config.image_size, weights.config.patch_size
    grid = image_size // patch
    if not grid:
        raise UserError(f"image_size={image_size}: expected at least a patch, {patch} pixels")
    params, encoder = weights.params, dict(weights.params["encoder"])
    if "position_embedding" in encoder:
        positions = resize_position_embedding(encoder["position_embedding"], old // patch, grid)
        params = {**params, "encoder": encoder | {"position_embedding": positions}}
    preprocessing = {**weights.preprocessing, "image_size": grid * patch}
    preprocessing["resize_to"] = image_size if image_size % patch else 0
    config = dataclasses.replace(weights.config, image_size=grid * patch)
    return weights._replace(config=config, params=params, preprocessing=preprocessing)


def flatten(params: Params) -> dict[str, Any]:
    """The leaves of a nested dict by their paths, `/` between."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(params)
    }


def shapes_of(params: Params) -> Shapes:
    """The shapes of (abstract) parameters by their paths."""
    return {path: tuple(x.shape) for path, x in flatten(params).items()}


def leaves(
    modules: Modules, shapes: Shapes, root: str = "", layer: int | None = None
) -> Iterator[tuple[str, str, Leaf]]:
    """(their module, "kernel" | "scale" | "bias" | "embedding", where it is), for what there is.

    Args:
      modules: (their module, ours below `root`, which of the kernels side by side it is or None).
      shapes: of our parameters; a leaf that they lack is passed over.
      layer: the number of a block in a stack; None is the whole array, with a stack's layer axis.
    """
    for theirs, ours, part in modules:
        for leaf in _LEAVES:
            path = "/".join(filter(None, (root, ours, leaf)))
            if path in shapes:
                slot = () if part is None else (part, slice(None))
                start = () if layer is None else (layer,)
                yield theirs, leaf, Leaf(path, (*start, ..., *slot))


def depth_of(shapes: Shapes, root: str) -> int:
    """Blocks in the stack `root`; 0 where there is none."""
    return next((shape[0] for path, shape in shapes.items() if path.startswith(f"{root}/")), 0)


def used_rows(table: Table, num_used: Mapping[str, Index]) -> Table:
    """`table` without the padding of a vocabulary; `num_used` is the index of what is in use."""
    return {
        name: leaf._replace(index=num_used.get(leaf.path, leaf.index))
        for name, leaf in table.items()
    }


def export(table: Table, params: Params) -> FlatArrays:
    """Our parameters as their arrays.

    Where `params` are numpy arrays and no axes are joined, these are views of them, never copies.
    """
    ours = {path: np.asarray(x) for path, x in flatten(params).items()}
    check_covered(table, ours)
    return {name: _to_theirs(ours[leaf.path][leaf.index], leaf) for name, leaf in table.items()}


def fill(table: Table, arrays: Mapping[str, np.ndarray], shapes: Shapes, what: str) -> Params:
    """Our parameters, float32 on the host, from their arrays; padding is zero.

    Raises `UserError` with the whole difference where names or shapes are not those of `table`;
    `what` names what the arrays should have been, such as "a big_vision CapPa".
    """
    check_covered(table, shapes)
    ours = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    views = {name: ours[leaf.path][leaf.index] for name, leaf in table.items()}
    expected = {name: _their_shape(views[name], leaf) for name, leaf in table.items()}
    check_same({name: x.shape for name, x in arrays.items()}, expected, what)
    for name, leaf in table.items():
        views[name][...] = _to_ours(to_float32(arrays[name]), views[name], leaf)
    params: Params = {}
    for path, x in ours.items():
        *parents, last = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = x
    return params


def to_float32(x: np.ndarray) -> np.ndarray:
    """float32; numpy writes bfloat16 into a file as raw items of 2 bytes, which are taken as it."""
    x = np.asarray(x)
    if x.dtype.kind == "V" and x.dtype.itemsize == 2:
        x = x.view(ml_dtypes.bfloat16)
    return x.astype(np.float32, copy=False)


def check_covered(table: Table, ours: Mapping[str, Any]) -> None:
    """Raises `UserError` naming the parameters of ours that `table` has no place for."""
    homeless = sorted(ours.keys() - {leaf.path for leaf in table.values()})
    if homeless:
        raise UserError(f"the other format has no place for: {', '.join(homeless)}")


def check_same(found: Shapes, expected: Shapes, what: str) -> None:
    """Raises `UserError` with every name and shape that differs."""
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]
    differences = [
        f"{kind}: {', '.join(grouped(names))}"
        for kind, names in (("missing", missing), ("not used", extra), ("shapes", shapes))
        if names
    ]
    if differences:
        raise UserError(f"not the weights of {what}: {'; '.join(differences)}")


def grouped(names: list[str]) -> list[str]:
    """Names that differ in one number alone, as one: `encoderblock_{0..11}/LayerNorm_0/scale`."""
    counts = Counter(key for name in names for key, _ in _numbered(name))
    groups: dict[str, list[int]] = {}
    for name in names:
        key, number = max(_numbered(name), key=lambda pair: counts[pair[0]], default=(name, 0))
        groups.setdefault(key if counts[key] > 1 else name, []).append(number)
    return [key.replace("*", _span(numbers)) for key, numbers in groups.items()]


def _numbered(name: str) -> list[tuple[str, int]]:
    """For each number in a name that ends a part of it: the name without it, and the number."""
    found = re.finditer(r"\d+(?=[./])", name)
    return [(f"{name[: x.start()]}*{name[x.end() :]}", int(x[0])) for x in found]


def _span(numbers: list[int]) -> str:
    first, last = min(numbers), max(numbers)
    if len(numbers) == last - first + 1:
        return f"{{{first}..{last}}}"
    return f"{{{','.join(map(str, sorted(numbers)))}}}"


def _their_shape(view: np.ndarray, leaf: Leaf) -> tuple[int, ...]:
    if leaf.groups is None:
        return view.shape
    return tuple(math.prod(view.shape[axis] for axis in group) for group in leaf.groups)


def _to_theirs(view: np.ndarray, leaf: Leaf) -> np.ndarray:
    if leaf.groups is None:
        return view
    axes = [axis for group in leaf.groups for axis in group]
    return view.transpose(axes).reshape(_their_shape(view, leaf))


def _to_ours(x: np.ndarray, view: np.ndarray, leaf: Leaf) -> np.ndarray:
    if leaf.groups is None:
        return x
    axes = [axis for group in leaf.groups for axis in group]
    return x.reshape([view.shape[axis] for axis in axes]).transpose(np.argsort(axes))
