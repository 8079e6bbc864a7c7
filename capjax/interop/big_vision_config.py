"""The configuration of a model of big_vision's, read off the names and shapes of its arrays."""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.errors import UserError
from capjax.interop.mapping import GEMMA_TOKENS, FlatArrays
from capjax.models.captioner import CaptionerConfig
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.two_towers import TwoTowersConfig

CAPPA, TWO_TOWERS, VIT = "a big_vision CapPa", "big_vision two towers", "a big_vision ViT"
Config = TypeVar("Config", bound=ImageEncoderConfig)


def image_config(arrays: FlatArrays, fields: dict[str, Any]) -> ImageEncoderConfig:
    return _made(ImageEncoderConfig, _image_fields(arrays, "", VIT), fields, VIT)


def two_towers_config(arrays: FlatArrays, fields: dict[str, Any]) -> TwoTowersConfig:
    block = "txt/Encoder_0/encoderblock_"
    needed = ("txt/Embed_0/embedding", "txt/pos_embedding", "txt/head/kernel")
    embedding, positions, head = _shapes(arrays, needed, TWO_TOWERS)
    image = _image_fields(arrays, "img/", TWO_TOWERS)
    text = {f"text_{name}": x for name, x in _block_fields(arrays, block, TWO_TOWERS).items()}
    found = (
        image
        | text
        | {
            "vocab_size": embedding[0],
            "text_length": positions[1],
            "embedding_dim": head[1],
            "image_projection": "img/head/kernel" in arrays,
            "text_projection_bias": "txt/head/bias" in arrays,
            "logit_bias_init": -10.0 if "b" in arrays else None,
        }
    )
    padding = {"text_pad_id": PAD_ID if embedding[0] == GEMMA_TOKENS else EOS_ID}
    return _made(TwoTowersConfig, found, padding | fields, TWO_TOWERS)


def captioner_config(arrays: FlatArrays, fields: dict[str, Any]) -> CaptionerConfig:
    needed = ("decoder/EmbedTargets/embedding", "decoder/LogitsDense/kernel")
    embedding, head = _shapes(arrays, needed, CAPPA)
    block = "decoder/EncDecBlock"
    text = _block_fields(arrays, block, CAPPA, "SelfAttn", "MLP")
    found = _image_fields(arrays, "encoder/", CAPPA)
    found |= {f"decoder_{name}": x for name, x in text.items()}
    if "pos_embedding_decoder" in arrays:
        found["text_length"] = arrays["pos_embedding_decoder"].shape[1]
    found |= {
        "decoder_bias": f"{block}0/MLP/Dense_0/bias" in arrays,
        "vocab_size": head[1],
        "mask_token": embedding[0] > head[1],
    }
    return _made(CaptionerConfig, found, fields, CAPPA)


def _made(config_class: type[Config], found: dict[str, Any], fields: dict, what: str) -> Config:
    """A configuration: what the arrays tell of sizes, else `fields`.

    Raises `UserError` for sizes that neither tells.
    """
    fields = fields | found
    known = [field.name for field in dataclasses.fields(config_class)]
    missing = [name for name in ("image_size", "text_length") if name in known]
    missing = [name for name in missing if name not in fields]
    if missing:
        raise UserError(f"{what} with fixed positions: give {' and '.join(missing)}")
    return config_class(**fields)


def _image_fields(arrays: FlatArrays, tower: str, what: str) -> dict[str, Any]:
    """The fields of an image encoder, as far as its arrays tell them."""
    (patch,) = _shapes(arrays, (f"{tower}embedding/kernel",), what)
    positions = arrays.get(f"{tower}pos_embedding")
    pool = "map" if f"{tower}MAPHead_0/probe" in arrays else "gap"
    fields = {
        "patch_size": patch[0],
        "posemb": "sincos2d" if positions is None else "learn",
        "pool": "tok" if f"{tower}cls" in arrays else pool,
        **_block_fields(arrays, f"{tower}Transformer/encoderblock_", what),
    }
    if positions is not None:
        fields["image_size"] = patch[0] * math.isqrt(positions.shape[1])
    return fields


def _block_fields(
    arrays: FlatArrays,
    block: str,
    what: str,
    attention: str = "MultiHeadDotProductAttention_0",
    mlp: str = "MlpBlock_0",
) -> dict[str, int]:
    """Sizes of a stack, from its first block and the highest number."""
    needed = (f"{block}0/{attention}/query/kernel", f"{block}0/{mlp}/Dense_0/kernel")
    query, up = _shapes(arrays, needed, what)
    found = [re.match(rf"{block}(\d+)/", name) for name in arrays]
    return {
        "width": query[0],
        "depth": 1 + max(int(match[1]) for match in found if match),
        "num_heads": query[1],
        "mlp_dim": up[1],
    }


def _shapes(arrays: FlatArrays, names: Iterable[str], what: str) -> list[tuple[int, ...]]:
    """Shapes that a configuration is read from. Raises `UserError` naming all that are missing."""
    missing = [name for name in names if name not in arrays]
    if missing:
        raise UserError(f"not the weights of {what}: missing: {', '.join(missing)}")
    return [arrays[name].shape for name in names]
