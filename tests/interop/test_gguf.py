"""GGUF files: the model of transformers that was written into one, and its tokenizer."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from capjax.data.tokenizer import Tokenizer
from capjax.errors import UserError
from capjax.interop.gguf import read_language_model

SIZES = {"width": 64, "depth": 2, "heads": 4, "kv_heads": 2, "mlp": 96, "length": 40}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["c a", "ca t", "Ġ cat", "Ċ Ċ", "1 2"]
TEXTS = ["a cat", "two cats' cat: 12 hats!", " a  cat\n\ncat", "ÉCLAIR 猫 🐱 it's", ""]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture
def gguf(require_module):
    require_module("tokenizers")
    return require_module("gguf")


def vocabulary() -> list[str]:
    from tokenizers import pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*CONTROL, *symbols, *(pair.replace(" ", "") for pair in MERGES)]


def theirs_in_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter puts them: the halves of a head become neighbours."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def random_arrays(tied: bool) -> dict[str, np.ndarray]:
    """By transformers' names."""
    rng = np.random.default_rng(0)
    s = SimpleNamespace(**SIZES)
    shapes = {
        "self_attn.q_proj": (s.width, s.width),
        "self_attn.k_proj": (s.width * s.kv_heads // s.heads, s.width),
        "self_attn.v_proj": (s.width * s.kv_heads // s.heads, s.width),
        "self_attn.o_proj": (s.width, s.width),
        "mlp.gate_proj": (s.mlp, s.width),
        "mlp.up_proj": (s.mlp, s.width),
        "mlp.down_proj": (s.width, s.mlp),
    }
    found = {
        f"model.layers.{i}.{name}.weight": rng.normal(0, 0.2, shape)
        for i in range(s.depth)
        for name, shape in shapes.items()
    }
    norms = [
        f"model.layers.{i}.{x}layernorm" for i in (0, 1) for x in ("input_", "post_attention_")
    ]
    found |= {f"{name}.weight": rng.normal(1, 0.2, s.width) for name in (*norms, "model.norm")}
    for name in ("model.embed_tokens",) if tied else ("model.embed_tokens", "lm_head"):
        found[f"{name}.weight"] = rng.normal(0, 0.5, (len(vocabulary()), s.width))
    return {name: x.astype(np.float32) for name, x in found.items()}


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return f"{whole[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def write(gguf, path, tied=True, leave_out=(), **told) -> dict[str, np.ndarray]:
    """A tiny file; the arrays, as dequantised, by transformers' names."""
    s = SimpleNamespace(**SIZES)
    writer = gguf.GGUFWriter(path, told.pop("architecture", "llama"))
    writer.add_block_count(s.depth)
    writer.add_context_length(s.length)
    writer.add_embedding_length(s.width)
    writer.add_feed_forward_length(s.mlp)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in told.pop("more", {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(told.pop("words", "smollm"))
    writer.add_token_list(vocabulary())
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(vocabulary()) - 3)
    writer.add_token_types(told.pop("kinds", kinds))
    writer.add_token_merges(MERGES)
    arrays = random_arrays(tied)
    for name, x in arrays.items():
        kind = gguf.GGMLQuantizationType.F32
        if x.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
        stored = gguf.quantize(x, kind)
        arrays[name] = gguf.dequantize(stored, kind)
        heads = {"self_attn.q_proj": s.heads, "self_attn.k_proj": s.kv_heads}
        for part, count in heads.items():
            if part in name:
                stored = gguf.quantize(theirs_in_order(x, count), kind)
        if name not in leave_out:
            writer.add_tensor(gguf_name(name), stored, raw_dtype=kind)
    for name in told.pop("extra", ()):
        writer.add_tensor(name, np.ones(4, np.float32))
    assert not told
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers(tied, gguf, libraries, tmp_path):
    """Who has the file's arrays, turns the halves of a head, and knows nothing of the file."""
    arrays = write(gguf, tmp_path / "tiny.gguf", tied=tied)
    torch, transformers = libraries.torch, libraries.transformers
    s = SimpleNamespace(**SIZES)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=s.width,
        intermediate_size=s.mlp,
        num_hidden_layers=s.depth,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        max_position_embeddings=s.length,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    state = {name: torch.from_numpy(x) for name, x in arrays.items()}
    found = theirs.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) == ({"lm_head.weight"} if tied else set())
    theirs.tie_weights()
    tokens = np.random.default_rng(1).integers(0, len(vocabulary()), (3, 20)).astype(np.int32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    ours = read_language_model(tmp_path / "tiny.gguf")
    model, params = ours.model, ours.params
    logits = np.asarray(model.logits(params, model.hidden(params, jnp.asarray(tokens))))
    np.testing.assert_allclose(logits[..., : model.vocab_size], want, rtol=1e-4, atol=1e-4)
    assert np.abs(want).max() > 1


def test_its_ids_are_a_captioners(gguf, tmp_path):
    write(gguf, tmp_path / "tiny.gguf")
    ours = read_language_model(tmp_path / "tiny.gguf")
    tokens, tokenizer = vocabulary(), ours.tokenizer
    assert tokenizer.eos_id == 1
    assert tokenizer.vocab_size == ours.model.vocab_size == len(tokens)
    assert ours.model.config.start_id == 0
    ends = {tokens[i] for i in ours.model.config.end_ids}
    assert ends == {*CONTROL, "Ċ", "č", "ĊĊ"}
    assert tokenizer.pieces("a cat\n\n12") == ["a", "Ġcat", "ĊĊ", "1", "2"]  # each digit alone
    for text in TEXTS:
        ids = tokenizer.encode(text, 60)
        assert tokenizer.decode(ids) == text
        assert (ids == 1).sum() == 1
    # A captioner trained on the exported file has the same ids, and is known by it.
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.model_bytes)
    guidance = ours.guidance(Tokenizer.from_file(tmp_path / "tokenizer.json"))
    assert guidance.model == ours.model
    assert read_language_model(tmp_path / "tiny.gguf").tokenizer == tokenizer
    write(gguf, tmp_path / "other.gguf", words="gpt-2")
    other = read_language_model(tmp_path / "other.gguf").tokenizer
    assert other.pieces("12") == ["12"]
    with pytest.raises(UserError, match="only equal ids can be weighed"):
        ours.guidance(other)


def test_a_prompt_is_cut_into_tokens_as_if_a_text_followed(gguf, tmp_path):
    """Before a word two newlines are two tokens, at the end of a text one."""
    write(gguf, tmp_path / "tiny.gguf")
    ours = read_language_model(tmp_path / "tiny.gguf")
    assert ours.tokenizer.pieces("cat\n\n") == ["cat", "ĊĊ"]
    prompt = ours.prompted(["cat"]).params["prompt"]
    assert ours.tokenizer.pieces("cat\n\na") == ["cat", "Ċ", "Ċ", "a"]
    assert int(prompt.length) + 1 == len(["<|endoftext|>", "cat", "Ċ", "Ċ"])
    assert vocabulary()[prompt.last] == "Ċ"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "mamba"}, r"general\.architecture=mamba: expected llama"),
        ({"words": "qwen2"}, "a tokenizer of kind gpt2, qwen2: expected gpt2 with one of gpt-2"),
        ({"more": {"llama.rope.scaling.type": "yarn"}}, "yarn: only none is supported"),
        ({"more": {"llama.rope.dimension_count": 8}}, "dimension_count=8: only 16 is supported"),
        ({"extra": ["rope_freqs.weight"]}, r"not used: rope_freqs\.weight"),
        (
            {"leave_out": ["model.norm.weight"]},
            r"missing: output_norm\.weight",
        ),
        ({"kinds": [1] * 264}, r"tokens 0 and 1 are '<\|endoftext\|>' and .*: expected control"),
    ],
)
def test_other_models_are_refused(changed, message, gguf, tmp_path):
    path = tmp_path / "tiny.gguf"
    write(gguf, path, **changed)
    with pytest.raises(UserError, match=rf"tiny\.gguf: .*{message}"):
        read_language_model(path)


def test_other_files_are_refused(gguf, tmp_path):
    with pytest.raises(UserError, match=r"missing\.gguf cannot be read \(No such file"):
        read_language_model(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("no such thing " * 9)
    with pytest.raises(UserError, match=r"text\.gguf: not a readable GGUF file \(GGUF magic"):
        read_language_model(tmp_path / "text.gguf")
    write(gguf, tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "cut.gguf").read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"cut\.gguf: not a readable GGUF file"):
        read_language_model(tmp_path / "cut.gguf")
