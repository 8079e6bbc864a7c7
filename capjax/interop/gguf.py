"""Language models in GGUF files (those of llama.cpp), dequantised: the architecture "llama".

Names and meaning: llama.cpp's `gguf-py/gguf/constants.py`. Its converter has put the rows of
queries and keys in the order in which `grouped_attention` turns them: they are read as they lie.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from capjax.data.tokenizer import EOS_ID, PAD_ID, Tokenizer
from capjax.decoding.rescoring import LoadedLanguageModel
from capjax.errors import UserError
from capjax.interop.gguf_tokenizer import CONTROL, tokenizer_json
from capjax.interop.mapping import Leaf, Table, fill, shapes_of
from capjax.interop.tensor_files import need_package
from capjax.models.language_model import LanguageModel, LanguageModelConfig

_BLOCK = (  # theirs, ours, which axes of ours those of theirs join (as `Leaf.groups`)
    ("attn_norm", "attention_norm/scale", None),
    ("attn_q", "attention/query/kernel", ((1, 2, 3), (0,))),
    ("attn_k", "attention/key/kernel", ((1, 2), (0,))),
    ("attn_v", "attention/value/kernel", ((1, 2), (0,))),
    ("attn_output", "attention/out/kernel", ((3,), (0, 1, 2))),
    ("ffn_norm", "mlp_norm/scale", None),
    ("ffn_gate", "gate/kernel", ((1,), (0,))),
    ("ffn_up", "up/kernel", ((1,), (0,))),
    ("ffn_down", "down/kernel", ((1,), (0,))),
)
_START = "<|endoftext|>"  # between the documents that models with this token were trained on
_NEWLINES = ("Ċ", "č")  # a line feed and a carriage return in byte-level vocabularies


def read_language_model(path: str | Path, dtype: str = "float32") -> LoadedLanguageModel:
    """The model, its parameters in float32, and its tokenizer as a captioner would have it.

    Its ids 0 and 1 have to be control tokens, which no text holds, since a caption's padding and
    end have those ids; SmolLM2's are so. `dtype` is that of the computation.

    Raises `UserError` where the file cannot be read, the package `gguf` is missing, or the model is
    none that `LanguageModel` computes.
    """
    library = need_package("gguf", "lm")
    try:
        file = library.GGUFReader(path)
        told = {name: field.contents() for name, field in file.fields.items()}
        arrays = {x.name: library.dequantize(x.data, x.tensor_type) for x in file.tensors}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except Exception as error:  # the library's many kinds
        raise UserError(f"{path}: not a readable GGUF file ({error})") from error
    try:
        config = _config(told, tied="output.weight" not in arrays, dtype=dtype)
        tokenizer = Tokenizer.from_bytes(tokenizer_json(told))
        model = LanguageModel(config)
        shapes = shapes_of(model.abstract_params())
        params = fill(_table(model), arrays, shapes, "a llama as the metadata say")
    except KeyError as error:
        raise UserError(f"{path}: its metadata lack {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return LoadedLanguageModel(model, jax.tree.map(jnp.asarray, params), tokenizer)


def _config(told: dict[str, Any], *, tied: bool, dtype: str) -> LanguageModelConfig:
    if told["general.architecture"] != "llama":
        raise UserError(f"general.architecture={told['general.architecture']}: expected llama")
    num_heads, width = told["llama.attention.head_count"], told["llama.embedding_length"]
    head_width = told.get("llama.attention.key_length", width // num_heads)
    for name, expected in (
        ("llama.rope.dimension_count", head_width),
        ("llama.attention.value_length", head_width),
        ("llama.rope.scaling.type", "none"),
        ("llama.expert_count", 0),
    ):
        if told.get(name, expected) != expected:
            raise UserError(f"{name}={told[name]}: only {expected} is supported")
    tokens, kinds = told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"]
    if [kinds[PAD_ID], kinds[EOS_ID]] != [CONTROL, CONTROL]:
        raise UserError(
            f"tokens {PAD_ID} and {EOS_ID} are {tokens[PAD_ID]!r} and {tokens[EOS_ID]!r}: expected "
            "control tokens, whose ids padding and the end of a caption can have"
        )
    ends = [
        number
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == CONTROL or token.startswith(_NEWLINES)
    ]
    return LanguageModelConfig(
        vocab_size=len(tokens),
        width=width,
        depth=told["llama.block_count"],
        num_heads=num_heads,
        num_kv_heads=told.get("llama.attention.head_count_kv", num_heads),
        head_width=head_width,
        mlp_dim=told["llama.feed_forward_length"],
        text_length=told["llama.context_length"],
        rotary_base=told.get("llama.rope.freq_base", 10_000.0),
        norm_eps=told["llama.attention.layer_norm_rms_epsilon"],
        tied=tied,
        dtype=dtype,
        start_id=tokens.index(_START) if _START in tokens else told["tokenizer.ggml.bos_token_id"],
        end_ids=tuple(ends),
    )


def _table(model: LanguageModel) -> Table:
    used = (slice(model.vocab_size),)
    table = {
        "token_embd.weight": Leaf("token_embedding/embedding", used),
        "output_norm.weight": Leaf("norm/scale"),
    }
    if not model.config.tied:
        table["output.weight"] = Leaf("head", used)
    return table | {
        f"blk.{layer}.{theirs}.weight": Leaf(f"blocks/{ours}", (layer,), groups)
        for layer in range(model.config.depth)
        for theirs, ours, groups in _BLOCK
    }
