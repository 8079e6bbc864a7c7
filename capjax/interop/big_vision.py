"""Weights of big_vision in and out: CapPa, two towers (SigLIP, SigLIP 2) and plain ViTs.

Source: `models/proj/cappa/cappa.py`, `models/proj/image_text/`, `models/vit.py` and `utils.py` of
google-research/big_vision. How its files are laid out is `npz`'s matter.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from capjax.dims import Params
from capjax.errors import UserError
from capjax.interop.big_vision_config import (
    CAPPA,
    TWO_TOWERS,
    VIT,
    captioner_config,
    image_config,
    two_towers_config,
)
from capjax.interop.compare import activation_lines, activations, inputs_for
from capjax.interop.mapping import (
    FlatArrays,
    Index,
    Leaf,
    Modules,
    Shapes,
    Table,
    Weights,
    depth_of,
    export,
    fill,
    leaves,
    model_of,
    shapes_of,
    used_rows,
)
from capjax.interop.npz import LAYOUTS, read_npz, split_subtree, stacked
from capjax.interop.reference import reference_activations
from capjax.models.captioner import CaptionerConfig
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.two_towers import TwoTowersConfig

# (their module, ours, which of the kernels that we keep side by side it is)
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
_IMAGE = (
    ("embedding", "encoder/patch_embedding", None),
    ("Transformer/encoder_norm", "encoder/norm", None),
    ("MAPHead_0/MultiHeadDotProductAttention_0/query", "image_head/pool/attention/query", None),
    ("MAPHead_0/MultiHeadDotProductAttention_0/key", "image_head/pool/attention/key_value", 0),
    ("MAPHead_0/MultiHeadDotProductAttention_0/value", "image_head/pool/attention/key_value", 1),
    ("MAPHead_0/MultiHeadDotProductAttention_0/out", "image_head/pool/attention/out", None),
    ("MAPHead_0/LayerNorm_0", "image_head/pool/norm", None),
    ("MAPHead_0/MlpBlock_0/Dense_0", "image_head/pool/mlp/up", None),
    ("MAPHead_0/MlpBlock_0/Dense_1", "image_head/pool/mlp/down", None),
    ("head", "image_head/projection", None),
)
_TEXT = (
    ("txt/Embed_0", "text_encoder/token_embedding", None),
    ("txt/Encoder_0/encoder_norm", "text_encoder/norm", None),
    ("txt/head", "text_encoder/projection", None),
)
_DECODER = (
    ("decoder/EmbedTargets", "decoder/token_embedding", None),
    ("decoder/LayerNorm", "decoder/norm", None),
    ("decoder/LogitsDense", "decoder/head", None),
)
# Single arrays: their name, ours, and how many axes theirs has (the first ones of length 1).
_IMAGE_ARRAYS = (
    ("pos_embedding", "encoder/position_embedding", 3),
    ("cls", "encoder/class_token", 3),
    ("MAPHead_0/probe", "image_head/pool/probe", 3),
)
_OTHER_ARRAYS = (
    ("txt/pos_embedding", "text_encoder/position_embedding", 3),
    ("t", "contrastive/logit_scale", 1),
    ("b", "contrastive/logit_bias", 1),
    ("pos_embedding_decoder", "decoder/position_embedding", 3),
)
# What every model of theirs computes with; a model of ours that does otherwise has no place there.
_NUMERICS = {
    "activation": "gelu_tanh",
    "norm_eps": 1e-6,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "text_causal": False,
    "text_pool": "last",
    "mask_padding": False,
}


def read(source: str | Path | Mapping[str, np.ndarray], **fields: Any) -> Weights:
    """The configuration and the parameters in a big_vision file.

    Args:
      source: an `.npz` file, perhaps with a sub-tree (`file.npz:img`), or its arrays by name.
      **fields: of the configuration: what the file does not tell (`image_size` and `text_length`
        where positions are fixed), and what is ours to choose (`dtype`, `remat`, `scan`, ...).

    Raises `UserError` with the whole difference where names or shapes are not theirs.
    """
    arrays = read_npz(source)
    fields = {name: value for name, value in fields.items() if value is not None}
    tops = {name.split("/")[0] for name in arrays}
    preprocessing = {"antialias": False, "mode": "stretch"}
    if "decoder" in tops:
        config = captioner_config(arrays, fields)
        params = _fill(config, arrays, CAPPA)
        return Weights("captioner", config, params, (), preprocessing)
    if "txt" in tops:
        config = two_towers_config(arrays, fields)
        params = _fill(config, arrays, TWO_TOWERS)
        return Weights("two_towers", config, params, (), preprocessing)
    if "embedding" not in tops:
        raise UserError(
            f"{_named(source)}: neither a CapPa nor two towers nor a ViT of big_vision's; "
            f"it has {', '.join(sorted(tops)) or 'nothing'}"
        )
    dropped = tops & {"head", "pre_logits"}
    arrays = {name: x for name, x in arrays.items() if name.split("/")[0] not in dropped}
    config = image_config(arrays, fields)
    notes = tuple(f"{name}/ (the classifier's) was left out" for name in sorted(dropped))
    return Weights("image_encoder", config, _fill(config, arrays, VIT), notes, preprocessing)


def write(path: str | Path, weights: Weights, layout: str = "loop") -> None:
    """Writes the weights as big_vision would, float32, in one of `LAYOUTS`."""
    if weights.model not in ("captioner", "two_towers", "image_encoder"):
        raise UserError(f"big_vision has no {weights.model}: write its model=image_encoder")
    arrays = to_arrays(weights.config, weights.params, layout)
    with Path(path).open("wb") as file:
        np.savez(file, **arrays)  # pyrefly: ignore


def compare(path: str | Path, weights: Weights) -> list[str]:
    """What the file computes by `reference`, beside what `weights` compute here."""
    inputs = inputs_for(weights.config)
    wanted = reference_activations(read_npz(path), weights.model, *inputs)
    found = activations(weights, *inputs)
    return activation_lines(found, wanted, "a NumPy reference of big_vision's equations")


def to_arrays(config: ImageEncoderConfig, params: Params, layout: str = "loop") -> FlatArrays:
    """Parameters, or their gradients, under big_vision's names, without padding.

    In loop layout numpy arrays give views of them, never copies. Raises `UserError` where
    big_vision has no such model.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout!r}: choose one of {LAYOUTS}")
    numerics = _NUMERICS | {"text_posemb": config.posemb}  # one kind of positions for both towers
    for name, theirs in numerics.items():
        if (ours := getattr(config, name, theirs)) != theirs:
            raise UserError(f"{name}={ours!r}: big_vision's models have {theirs!r}")
    arrays = export(_table(config, shapes_of(params)), params)
    return stacked(arrays) if layout == "scan" else arrays


def _fill(config: ImageEncoderConfig, arrays: FlatArrays, what: str) -> Params:
    shapes = shapes_of(model_of(config).abstract_params())
    return fill(_table(config, shapes), arrays, shapes, what)


def _table(config: ImageEncoderConfig, shapes: Shapes) -> Table:
    """Where each array of the model of this configuration lies in ours."""
    match config:
        case CaptionerConfig():
            tower, modules, used = "encoder/", _DECODER, _captioner_rows(config)
        case TwoTowersConfig():
            rows: Index = (slice(config.vocab_size),)
            tower, modules = "img/", _TEXT
            used = {"text_encoder/token_embedding/embedding": rows}
        case _:
            tower, modules, used = "", (), {}
    below_tower = [(f"{tower}{theirs}", ours, part) for theirs, ours, part in _IMAGE]
    table = _entries((*below_tower, *modules), shapes)
    # CapPa's encoder has neither class token nor head.
    image_arrays = _IMAGE_ARRAYS[:1] if isinstance(config, CaptionerConfig) else _IMAGE_ARRAYS
    arrays = [(f"{tower}{theirs}", ours, axes) for theirs, ours, axes in image_arrays]
    for theirs, path, axes in (*arrays, *_OTHER_ARRAYS):
        if path in shapes:
            ones = axes - len(shapes[path])
            groups = (*((),) * ones, *((i,) for i in range(axes - ones)))
            table[theirs] = Leaf(path, groups=groups)
    for theirs, root, modules in (
        (f"{tower}Transformer/encoderblock_", "encoder/blocks", _ENCODER_BLOCK),
        ("txt/Encoder_0/encoderblock_", "text_encoder/blocks", _ENCODER_BLOCK),
        ("decoder/EncDecBlock", "decoder/blocks", _DECODER_BLOCK),
    ):
        for i in range(depth_of(shapes, root)):
            table |= {
                f"{theirs}{i}/{module}/{leaf}": where
                for module, leaf, where in leaves(modules, shapes, root, i)
            }
    return used_rows(table, used)


def _entries(modules: Modules, shapes: Shapes) -> Table:
    return {f"{theirs}/{leaf}": where for theirs, leaf, where in leaves(modules, shapes)}


def _captioner_rows(config: CaptionerConfig) -> dict[str, Index]:
    """What is in use of the padded vocabularies."""
    tokens = slice(config.vocab_size)
    return {
        "decoder/token_embedding/embedding": (slice(config.num_embeddings),),
        "decoder/head/kernel": (slice(None), tokens),
        "decoder/head/bias": (tokens,),
    }


def _named(source: Any) -> str:
    path = "the arrays" if isinstance(source, Mapping) else ":".join(split_subtree(source))
    return path.removesuffix(":")
