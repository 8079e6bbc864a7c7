"""Weights of big_vision in and out: `.npz` files with `/`-joined names.

Both of its layouts are read and written: "loop" (one entry per block) and "scan" (blocks stacked on
axis 0 in encoders and on axis 1 in CapPa's decoder). Source: `models/proj/cappa/cappa.py`,
`models/vit.py` and `utils.py` of google-research/big_vision.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capjax.dims import Params
from capjax.errors import UserError
from capjax.interop.mapping import (
    FlatArrays,
    Index,
    Leaf,
    Shapes,
    Table,
    depth_of,
    export,
    fill,
    leaves,
    shapes_of,
    used_rows,
)
from capjax.models import Captioner, CaptionerConfig

LAYOUTS = ("loop", "scan")


class _Stack(NamedTuple):
    """A stack of blocks: theirs is `name/...` in scan layout, `name<separator>0/...` in loop."""

    name: str
    separator: str
    axis: int  # on which the scan layout stacks
    path: str  # ours
    modules: tuple[tuple[str, str, int | None], ...]


_ENCODER_BLOCK = (
    ("LayerNorm_0", "attention_norm", None),
    ("MultiHeadDotProductAttention_0/query", "attention/qkv", 0),
    ("MultiHeadDotProductAttention_0/key", "attention/qkv", 1),
    ("MultiHeadDotProductAttention_0/value", "attention/qkv", 2),
    ("MultiHeadDotProductAttention_0/out", "attention/out", None),
    ("LayerNorm_1", "mlp_norm", None),
    ("MlpBlock_0/Dense_0", "mlp/up", None),
    ("MlpBlock_0/Dense_1", "mlp/down", None),
)
_DECODER_BLOCK = (
    ("LayerNorm1", "self_norm", None),
    ("SelfAttn/query", "self_attention/qkv", 0),
    ("SelfAttn/key", "self_attention/qkv", 1),
    ("SelfAttn/value", "self_attention/qkv", 2),
    ("SelfAttn/out", "self_attention/out", None),
    ("LayerNorm2", "cross_norm", None),
    ("CrossAttn/query", "cross_attention/query", None),
    ("CrossAttn/key", "cross_attention/key_value", 0),
    ("CrossAttn/value", "cross_attention/key_value", 1),
    ("CrossAttn/out", "cross_attention/out", None),
    ("LayerNorm3", "mlp_norm", None),
    ("MLP/Dense_0", "mlp/up", None),
    ("MLP/Dense_1", "mlp/down", None),
)
_CAPTIONER_MODULES = (
    ("encoder/embedding", "encoder/patch_embedding", None),
    ("encoder/Transformer/encoder_norm", "encoder/norm", None),
    ("decoder/EmbedTargets", "decoder/token_embedding", None),
    ("decoder/LayerNorm", "decoder/norm", None),
    ("decoder/LogitsDense", "decoder/head", None),
)
_CAPTIONER_TABLE = {
    "encoder/pos_embedding": Leaf("encoder/position_embedding", groups=((), (0,), (1,))),
    "pos_embedding_decoder": Leaf("decoder/position_embedding", groups=((), (0,), (1,))),
}
_CAPTIONER_STACKS = (
    _Stack("encoder/Transformer/encoderblock", "_", 0, "encoder/blocks", _ENCODER_BLOCK),
    _Stack("decoder/EncDecBlock", "", 1, "decoder/blocks", _DECODER_BLOCK),
)


def captioner_from_npz(
    source: str | Path | Mapping[str, np.ndarray],
    *,
    image_size: int | None = None,
    text_length: int | None = None,
    **numerics: Any,
) -> tuple[CaptionerConfig, Params]:
    """The configuration and the parameters (float32, on the host) in a big_vision CapPa file.

    Args:
      source: an `.npz` file, or its arrays by name; in loop or scan layout, under `params/`,
        under `opt/target/` or at the top; bfloat16 may arrive as raw 2-byte items.
      image_size: pixels; needed where the positions are fixed, and so are not in the file.
      text_length: tokens; likewise.
      **numerics: further fields of `CaptionerConfig`: dtype, remat, scan.

    Raises `UserError` with the whole difference where names or shapes are not those of a CapPa.
    """
    arrays = _read(source)
    config = _infer_config(arrays, image_size, text_length, numerics)
    shapes = shapes_of(Captioner(config).abstract_params())
    layout = _layout_of(arrays, _CAPTIONER_STACKS)
    table = _captioner_table(config, shapes, layout)
    return config, fill(table, arrays, shapes, "a big_vision CapPa")


def captioner_to_npz(
    path: str | Path, config: CaptionerConfig, params: Params, *, layout: str = "loop"
) -> None:
    """Writes `params` as big_vision would, in one of `LAYOUTS`."""
    np.savez(path, **captioner_to_arrays(config, params, layout=layout))  # pyrefly: ignore


def captioner_to_arrays(
    config: CaptionerConfig, params: Params, *, layout: str = "loop"
) -> FlatArrays:
    """`params` under big_vision's names, without padding, in one of `LAYOUTS`.

    Where `params` are numpy arrays these are views of them, never copies.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout!r}: choose one of {LAYOUTS}")
    return export(_captioner_table(config, shapes_of(params), layout), params)


def _captioner_table(config: CaptionerConfig, shapes: Shapes, layout: str) -> Table:
    tokens = slice(config.vocab_size)
    used: dict[str, Index] = {
        "decoder/token_embedding/embedding": (slice(config.num_embeddings),),
        "decoder/head/kernel": (slice(None), tokens),
        "decoder/head/bias": (tokens,),
    }
    table = {name: leaf for name, leaf in _CAPTIONER_TABLE.items() if leaf.path in shapes}
    table |= {f"{name}/{x}": leaf for name, x, leaf in leaves(_CAPTIONER_MODULES, shapes)}
    for stack in _CAPTIONER_STACKS:
        table |= _stack_table(stack, shapes, layout)
    return used_rows(table, used)


def _stack_table(stack: _Stack, shapes: Shapes, layout: str) -> Table:
    if layout == "loop":
        return {
            f"{stack.name}{stack.separator}{i}/{module}/{x}": leaf
            for i in range(depth_of(shapes, stack.path))
            for module, x, leaf in leaves(stack.modules, shapes, stack.path, i)
        }
    table = {}
    for module, x, leaf in leaves(stack.modules, shapes, stack.path):
        axes = list(range(1, len(shapes[leaf.path]) - (len(leaf.index) > 1)))
        axes.insert(stack.axis, 0)
        groups = tuple((axis,) for axis in axes)
        table[f"{stack.name}/{module}/{x}"] = leaf._replace(groups=groups)
    return table


def _layout_of(arrays: Mapping[str, np.ndarray], stacks: tuple[_Stack, ...]) -> str:
    in_scan = any(name.startswith(f"{stack.name}/") for stack in stacks for name in arrays)
    return "scan" if in_scan else "loop"


def _read(source: str | Path | Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The arrays at the parameters' own names."""
    if not isinstance(source, Mapping):
        try:
            with np.load(source, allow_pickle=False) as file:
                source = {name: file[name] for name in file.files}
        except (OSError, ValueError) as error:
            raise UserError(f"{source}: not a readable .npz file ({error})") from error
    for prefix in ("params/", "opt/target/"):
        if any(name.startswith(prefix) for name in source):
            names = [name for name in source if name.startswith(prefix)]
            return {name.removeprefix(prefix): source[name] for name in names}
    return source


def _infer_config(
    arrays: Mapping[str, np.ndarray],
    image_size: int | None,
    text_length: int | None,
    numerics: dict,
) -> CaptionerConfig:
    """The configuration that these arrays are of, if they are a CapPa's at all."""
    shapes = {name: x.shape for name, x in arrays.items()}
    depths = [_add_any_block(shapes, stack) for stack in _CAPTIONER_STACKS]
    encoder, decoder = (f"{stack.name}*" for stack in _CAPTIONER_STACKS)
    needed = (
        "encoder/embedding/kernel",
        f"{encoder}/MultiHeadDotProductAttention_0/query/kernel",
        f"{encoder}/MlpBlock_0/Dense_0/kernel",
        "decoder/EmbedTargets/embedding",
        f"{decoder}/SelfAttn/query/kernel",
        f"{decoder}/MLP/Dense_0/kernel",
        "decoder/LogitsDense/kernel",
    )
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise UserError(f"not the weights of a big_vision CapPa: missing: {', '.join(missing)}")
    patch, heads, mlp, tokens, text_heads, text_mlp, head = (shapes[name] for name in needed)
    learned = "encoder/pos_embedding" in shapes
    if learned:
        image_size = image_size or patch[0] * math.isqrt(shapes["encoder/pos_embedding"][1])
        text_length = text_length or shapes.get("pos_embedding_decoder", (1, 64))[1]
    if not image_size or not text_length:
        raise UserError("weights with fixed positions: give image_size and text_length")
    return CaptionerConfig(
        image_size=image_size,
        patch_size=patch[0],
        width=patch[-1],
        depth=depths[0],
        num_heads=heads[1],
        mlp_dim=mlp[1],
        posemb="learn" if learned else "sincos2d",
        decoder_width=head[0],
        decoder_depth=depths[1],
        decoder_num_heads=text_heads[1],
        decoder_mlp_dim=text_mlp[1],
        decoder_bias=f"{decoder}/MLP/Dense_0/bias" in shapes,
        vocab_size=head[1],
        text_length=text_length,
        mask_token=tokens[0] > head[1],
        **numerics,
    )


def _add_any_block(shapes: Shapes, stack: _Stack) -> int:
    """Adds the shapes in one block of a stack as `name*/...`; returns the number of blocks."""
    depth = 0
    for name, shape in list(shapes.items()):
        match = re.fullmatch(rf"{stack.name}(?:{stack.separator}(\d+))?/(.+)", name)
        if match is None:
            continue
        number, rest = match.groups()
        if number is None:
            depth = max(depth, shape[stack.axis])
            shape = shape[: stack.axis] + shape[stack.axis + 1 :]
        depth = max(depth, 0 if number is None else int(number) + 1)
        shapes[f"{stack.name}*/{rest}"] = shape
    return depth
