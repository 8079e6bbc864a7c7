"""A language model on this machine as a chat endpoint: what it reads, and what it writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax import cli
from capjax.data.boost_endpoint import RequestFailed
from capjax.data.records import Caption, Example, write_shards
from capjax.data.sources import open_source
from capjax.data.tokenizer import EOS_ID, Tokenizer
from capjax.decoding.chat import LocalChat, _write
from capjax.decoding.rescoring import LoadedLanguageModel
from capjax.interop.gguf import read_language_model
from capjax.models.language_model import LanguageModel, LanguageModelConfig
from tests.interop import test_gguf

MESSAGES = [{"role": "user", "content": "a red cat on the grass"}]


@pytest.fixture(scope="module")
def language_model() -> LoadedLanguageModel:
    tokenizer = Tokenizer.train(["a red cat", "two dogs on the grass"] * 3, 280)
    sizes = {"width": 16, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_width": 8}
    config = LanguageModelConfig(
        vocab_size=tokenizer.vocab_size, mlp_dim=24, text_length=90, start_id=2, **sizes
    )
    model = LanguageModel(config)
    params = jax.tree.map(lambda x: 1.5 * x, model.init(jax.random.key(0)))
    return LoadedLanguageModel(model, params, tokenizer)


def test_each_token_is_the_likeliest_behind_those_before_it(language_model):
    model = language_model.model
    prompt_P = np.array([2, 40, 41, 42, 43], np.int32)
    params = model.read_prompt(language_model.params, prompt_P)
    tokens_L = np.asarray(_write(model, params, jnp.float32(0), jax.random.key(0), length=12))
    whole_BL = jnp.asarray(np.concatenate([prompt_P, tokens_L])[None])
    plain = language_model.params
    logits_BLV = model.caption_logits(model.logits(plain, model.hidden(plain, whole_BL)))
    want_L = np.asarray(jnp.argmax(logits_BLV[0, len(prompt_P) - 1 : -1], axis=-1))
    end = tokens_L.tolist().index(EOS_ID) + 1 if EOS_ID in tokens_L else 12
    assert end > 3
    np.testing.assert_array_equal(tokens_L[:end], want_L[:end])
    assert not tokens_L[end:].any()


def test_a_seed_decides_what_is_drawn(language_model):
    chat = LocalChat(language_model)
    body = {"messages": MESSAGES, "max_tokens": 12, "temperature": 1.0}
    texts = [chat.ask(body | {"seed": seed}).text for seed in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]
    assert chat.ask({"messages": MESSAGES, "max_tokens": 3}).num_tokens <= 3


def test_a_request_that_is_too_long_fails_alone(language_model):
    chat = LocalChat(language_model)
    with pytest.raises(RequestFailed, match="reads at most 90"):
        chat.ask({"messages": [{"role": "user", "content": "a red cat " * 60}], "max_tokens": 12})
    assert chat.ask({"messages": MESSAGES, "max_tokens": 12}).num_prompt_tokens > 1
    chat.stop()
    with pytest.raises(RequestFailed, match="stopped"):
        chat.ask({"messages": MESSAGES, "max_tokens": 12})


@pytest.fixture
def gguf_file(require_module, tmp_path, monkeypatch):
    """A tiny model of random weights with SmolLM2's control tokens, which reads 1000 tokens."""
    require_module("tokenizers", "lm")
    monkeypatch.setitem(test_gguf.SIZES, "length", 1000)
    test_gguf.write(require_module("gguf", "lm"), tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_smollm2_is_asked_in_chatml(gguf_file):
    language_model = read_language_model(gguf_file)
    tokenizer = language_model.tokenizer

    def ids(text):
        return tokenizer.encode(text, tokenizer.count(text))[:-1].tolist()

    found = LocalChat(language_model)._prompt([{"role": "user", "content": "a cat"}])
    want = [1, *ids("user\na cat"), 2, *ids("\n"), 1, *ids("assistant\n")]
    assert found == want


def test_the_command_boosts_with_a_local_model(gguf_file, tmp_path, capsys):
    texts = [["a cat", "two cats"], ["a hat"]]
    examples = [
        Example(str(i), b"image", tuple(Caption(text) for text in captions))
        for i, captions in enumerate(texts)
    ]
    write_shards(examples, tmp_path / "source", "x", 10)
    command = ["data", "boost", f"--input={tmp_path}/source", f"--output={tmp_path}/out"]
    command += [f"--local={gguf_file}", "--max_tokens=8"]
    assert cli.main(command) == 0
    assert "1 requests" in capsys.readouterr().out
    assert open_source(tmp_path / "out")[1].captions[-1] == Caption("a hat", "blend", "en")
    (tmp_path / "out" / "manifest.json").unlink()
    assert cli.main(command) == 0
    assert "0 requests" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--local=none.gguf"], "none.gguf: cannot be read"),
        (["--endpoint=http://a/v1"], "--model=: expected the model's name"),
        (["--endpoint=http://a/v1", "--local=x.gguf"], "not allowed with"),
        ([], "--endpoint --local"),
    ],
)
def test_bad_input_is_one_clear_line(flags, message, capsys, tmp_path):
    assert cli.main(["data", "boost", "--input=emoji:val", f"--output={tmp_path}/x", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
