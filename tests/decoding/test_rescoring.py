"""Probabilities of texts: those of the loop, of any batch, of a prompt; and the order they give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.data.tokenizer import Tokenizer
from capjax.decoding.generate import generate
from capjax.decoding.options import DecodingOptions
from capjax.decoding.rescoring import LoadedLanguageModel, rank
from capjax.errors import UserError
from capjax.models.captioner import Captioner
from capjax.models.language_model import LanguageModel, LanguageModelConfig
from tests.decoding.conftest import CONFIG

TEXTS = ["a red cat", "two dogs on the grass beside a red cat", "", "a", "a red dog"]
NEWLINE = 3 + ord("\n")
PROMPT = ["two cats on the grass", "a dog"]


@pytest.fixture(scope="module")
def language_model() -> LoadedLanguageModel:
    """Where a newline, which is a byte of the vocabulary, ends a text too."""
    tokenizer = Tokenizer.train(TEXTS * 3, 290)
    config = LanguageModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        depth=2,
        num_heads=2,
        num_kv_heads=1,
        head_width=8,
        mlp_dim=24,
        text_length=100,
        start_id=2,
        end_ids=(0, 1, NEWLINE),
    )
    model = LanguageModel(config)
    params = jax.tree.map(lambda x: 1.5 * x, model.init(jax.random.key(0)))
    return LoadedLanguageModel(model, params, tokenizer)


@pytest.mark.parametrize("prompt", [[], PROMPT])
def test_the_same_as_guidance_counts_in_the_loop(language_model, prompt):
    """Token by token in a captioner's ids, where the end has what all ends have."""
    prompted = language_model.prompted(prompt)
    model, params, tokenizer = prompted.model, prompted.params, prompted.tokenizer
    tokens_BL = tokenizer.encode_batch(TEXTS, 30)
    inputs_BL = np.pad(tokens_BL, ((0, 0), (1, 0)))[:, :-1]

    @jax.jit
    def in_the_loop(params, inputs_BL):
        step, cache = model.start_decoding(params, batch=1, length=30, num_rows=len(TEXTS))

        def body(cache, x):
            index, tokens_B = x
            logits_1BV, _, cache = step(tokens_B[None], index, cache)
            return cache, jax.nn.log_softmax(logits_1BV[0])

        return jax.lax.scan(body, cache, (jnp.arange(30), inputs_BL.T))[1]

    logprobs_BLV = np.asarray(in_the_loop(params, inputs_BL)).transpose(1, 0, 2)
    each_BL = np.take_along_axis(logprobs_BLV, tokens_BL[:, :, None], 2)[:, :, 0]
    want = np.where(tokens_BL == 0, 0, each_BL).sum(1)
    found = language_model.logprobs(TEXTS, prompt)
    np.testing.assert_allclose(found.sum_T, want, rtol=1e-4)
    num_tokens = [tokenizer.count(text) for text in TEXTS]
    assert found.num_tokens_T.tolist() == num_tokens
    np.testing.assert_allclose(found.mean_T, want / num_tokens, rtol=1e-4)


def test_alone_it_writes_what_it_finds_probable(language_model, images):
    """With alpha 0 the captioner has no say, and beams are those of the language model."""
    config = dataclasses.replace(CONFIG, vocab_size=language_model.model.vocab_size)
    captioner, prompted = Captioner(config), language_model.prompted(PROMPT)
    options = DecodingOptions(num_beams=3, num_captions=2, max_length=6)
    made = generate(
        captioner,
        captioner.init(jax.random.key(0)),
        images[:2],
        options,
        language=prompted.guidance(language_model.tokenizer, alpha=0.0, beta=0.0),
    )
    np.testing.assert_array_equal(made.tokens_BSL[0], made.tokens_BSL[1])
    tokens_SL, model = made.tokens_BSL[0], prompted.model
    first_S1 = jnp.full((2, 1), model.prompt(prompted.params).last)
    inputs_SL = jnp.concatenate([first_S1, tokens_SL[:, :-1]], 1)
    logits_SLV = model.logits(prompted.params, model.hidden(prompted.params, inputs_SL))
    logprobs_SLV = jax.nn.log_softmax(model.caption_logits(logits_SLV))
    want_SL = jnp.take_along_axis(logprobs_SLV, tokens_SL[:, :, None], 2)[:, :, 0]
    found_SL = made.logprobs_BSL[0]
    np.testing.assert_allclose(
        found_SL, jnp.where(tokens_SL == 0, 0, want_SL), rtol=1e-4, atol=1e-5
    )
    assert made.num_tokens_BS.min() > 1


def test_neither_batch_nor_order_matters(language_model):
    want = language_model.logprobs(TEXTS, include_end=False)
    assert want.num_tokens_T[2] == want.sum_T[2] == want.mean_T[2] == 0
    found = language_model.logprobs(TEXTS[::-1], include_end=False, batch_size=2)
    np.testing.assert_allclose(found.sum_T[::-1], want.sum_T, rtol=1e-5)
    assert np.all(language_model.logprobs(TEXTS).sum_T < want.sum_T)


def test_a_prompt_is_replaced_not_followed(language_model):
    want = language_model.logprobs(TEXTS, PROMPT)
    prompted = language_model.prompted(["another"]).prompted(PROMPT)
    np.testing.assert_array_equal(prompted.logprobs(TEXTS).sum_T, want.sum_T)
    plain = language_model.logprobs(TEXTS)
    np.testing.assert_array_equal(prompted.logprobs(TEXTS, []).sum_T, plain.sum_T)
    assert np.all(np.abs(want.sum_T - plain.sum_T) > 1e-3)


def test_rank_is_the_weighted_sum():
    order, scores = rank(
        [-5.0, -1.0, -3.0], [-1.0, -4.0, -1.5], [-2.0, -3.0, -9.0], alpha=2.0, beta=1.0
    )
    np.testing.assert_allclose(scores, [-5.0, -6.0, 3.0])
    assert order.tolist() == [2, 0, 1]
    assert rank([-5.0, -1.0], [-1.0, -4.0], alpha=0.0)[0].tolist() == [1, 0]
    assert rank([1.0, 1.0], [0.0, 0.0])[0].tolist() == [0, 1]  # the first of equals


def test_what_cannot_be_is_told(language_model):
    same = Tokenizer.from_bytes(language_model.tokenizer.model_bytes)
    guidance = language_model.guidance(same, alpha=5.0, beta=2.5)
    assert (guidance.model, guidance.alpha, guidance.beta) == (language_model.model, 5, 2.5)
    with pytest.raises(UserError, match=r"data\.tokenizer\.path .* or write several .* rescore"):
        language_model.guidance(Tokenizer.train(["another text"], 280))
    with pytest.raises(UserError, match="prompt='a cat': expected a list of captions"):
        language_model.logprobs(TEXTS, "a cat")
    with pytest.raises(UserError, match=r"at most 100; give fewer captions"):
        language_model.prompted(TEXTS * 20)
    with pytest.raises(UserError, match=r"texts\[1\] has \d+ tokens, .* at most 100"):
        language_model.logprobs(["a", "grass " * 101])


def test_a_computation_in_bfloat16_is_near(language_model):
    config = dataclasses.replace(language_model.model.config, dtype="bfloat16")
    rough = dataclasses.replace(language_model, model=LanguageModel(config))
    found, want = rough.logprobs(TEXTS, PROMPT), language_model.logprobs(TEXTS, PROMPT)
    np.testing.assert_allclose(found.mean_T, want.mean_T, rtol=0.05)
