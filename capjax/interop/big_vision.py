"""Weights of big_vision's CapPa in and out: `.npz` files with `/`-joined names.

Both of its layouts are read and written: "loop" (one entry per block) and "scan" (blocks stacked on
axis 0 in the encoder and on axis 1 in the decoder). Source: `models/proj/cappa/cappa.py`,
`models/vit.py` and `utils.py` of google-research/big_vision.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from capjax.dims import Params
from capjax.errors import UserError
from capjax.models import Captioner, CaptionerConfig

LAYOUTS = ("loop", "scan")
FlatArrays = dict[str, np.ndarray]

# Their name, ours. Leaves of ours that a configuration lacks are skipped.
_OUTSIDE_BLOCKS = (
    ("encoder/embedding/kernel", "encoder/patch_embedding/kernel"),
    ("encoder/embedding/bias", "encoder/patch_embedding/bias"),
    ("encoder/pos_embedding", "encoder/position_embedding"),
    ("encoder/Transformer/encoder_norm/scale", "encoder/norm/scale"),
    ("encoder/Transformer/encoder_norm/bias", "encoder/norm/bias"),
    ("pos_embedding_decoder", "decoder/position_embedding"),
    ("decoder/EmbedTargets/embedding", "decoder/token_embedding/embedding"),
    ("decoder/LayerNorm/scale", "decoder/norm/scale"),
    ("decoder/LayerNorm/bias", "decoder/norm/bias"),
    ("decoder/LogitsDense/kernel", "decoder/head/kernel"),
    ("decoder/LogitsDense/bias", "decoder/head/bias"),
)

# Their module in a block, ours, and which of the kernels that we keep side by side it is.
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
# Their blocks (scan layout; "loop" appends the number), the axis they stack on, ours, the table.
_STACKS = (
    ("encoder/Transformer/encoderblock", "_", 0, "encoder/blocks", _ENCODER_BLOCK),
    ("decoder/EncDecBlock", "", 1, "decoder/blocks", _DECODER_BLOCK),
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
    params = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32), Captioner(config).abstract_params()
    )
    layout = "scan" if any(name.startswith(f"{_STACKS[0][0]}/") for name in arrays) else "loop"
    views = captioner_to_arrays(config, params, layout=layout)
    _check_equal(arrays, views)
    for name, view in views.items():
        view[...] = arrays[name]
    return config, params


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
    ours = {name: np.asarray(x) for name, x in _flatten(params).items()}
    used = _used_sizes(config)
    arrays = {}
    for theirs, name in _OUTSIDE_BLOCKS:
        if name in ours:
            x = ours[name][used.get(name, ())]
            arrays[theirs] = x[None] if "pos_embedding" in theirs else x
    for root, separator, axis, our_root, table in _STACKS:
        for module, our_module, part in table:
            for leaf in ("kernel", "scale", "bias"):
                stacked = ours.get(f"{our_root}/{our_module}/{leaf}")
                if stacked is None:
                    continue
                if part is not None:
                    stacked = stacked[..., part, :]
                if layout == "scan":
                    arrays[f"{root}/{module}/{leaf}"] = np.moveaxis(stacked, 0, axis)
                    continue
                for i, x in enumerate(stacked):
                    arrays[f"{root}{separator}{i}/{module}/{leaf}"] = x
    return arrays


def _used_sizes(config: CaptionerConfig) -> dict[str, tuple[slice, ...]]:
    """Of the arrays that we pad, the part that is used."""
    tokens = slice(config.vocab_size)
    return {
        "decoder/token_embedding/embedding": (slice(config.num_embeddings),),
        "decoder/head/kernel": (slice(None), tokens),
        "decoder/head/bias": (tokens,),
    }


def _read(source: str | Path | Mapping[str, np.ndarray]) -> FlatArrays:
    """The arrays at the parameters' own names, as float32."""
    if not isinstance(source, Mapping):
        try:
            with np.load(source, allow_pickle=False) as file:
                source = {name: file[name] for name in file.files}
        except (OSError, ValueError) as error:
            raise UserError(f"{source}: not a readable .npz file ({error})") from error
    for prefix in ("params/", "opt/target/"):
        if any(name.startswith(prefix) for name in source):
            names = [name for name in source if name.startswith(prefix)]
            source = {name.removeprefix(prefix): source[name] for name in names}
            break
    return {name: _to_float32(np.asarray(x)) for name, x in source.items()}


def _to_float32(x: np.ndarray) -> np.ndarray:
    # numpy writes bfloat16 into a file as raw items of 2 bytes.
    if x.dtype.kind == "V" and x.dtype.itemsize == 2:
        x = x.view(ml_dtypes.bfloat16)
    return x.astype(np.float32)


def _infer_config(
    arrays: FlatArrays, image_size: int | None, text_length: int | None, numerics: dict
) -> CaptionerConfig:
    """The configuration that these arrays are of, if they are a CapPa's at all."""
    shapes = {name: x.shape for name, x in arrays.items()}
    depths = [_add_any_block(shapes, *stack[:3]) for stack in _STACKS]
    encoder, decoder = (f"{stack[0]}*" for stack in _STACKS)
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


def _add_any_block(shapes: dict[str, tuple[int, ...]], root: str, separator: str, axis: int) -> int:
    """Adds the shapes in one block of a stack as `root*/...`; returns the number of blocks."""
    depth = 0
    for name, shape in list(shapes.items()):
        match = re.fullmatch(rf"{root}(?:{separator}(\d+))?/(.+)", name)
        if match is None:
            continue
        number, rest = match.groups()
        depth = max(depth, shape[axis] if number is None else int(number) + 1)
        shapes[f"{root}*/{rest}"] = shape[:axis] + shape[axis + 1 :] if number is None else shape
    return depth


def _check_equal(arrays: FlatArrays, expected: FlatArrays) -> None:
    missing = sorted(expected.keys() - arrays.keys())
    extra = sorted(arrays.keys() - expected.keys())
    shapes = [
        f"{name} {arrays[name].shape} instead of {x.shape}"
        for name, x in sorted(expected.items())
        if name in arrays and arrays[name].shape != x.shape
    ]
    differences = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("not used", extra), ("shapes", shapes))
        if names
    ]
    if differences:
        raise UserError(f"not the weights of a big_vision CapPa: {'; '.join(differences)}")


def _flatten(params: Params) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(params)
    }
