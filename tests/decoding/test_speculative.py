"""Drafts and refilled slots change how captions are written, not which."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.data.tokenizer import EOS_ID
from capjax.decoding import speculative
from capjax.decoding.generate import generate
from capjax.decoding.options import DecodingOptions
from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch, place_tree
from capjax.models.captioner import Captioner

LENGTH = 8


def assert_same(made, expected):
    """Tokens, lengths and reasons are equal, numbers to rounding."""
    for name, x, y in zip(made._fields, made, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("changes", [{}, {"decoder_posemb": "rotary", "decoder_qk_norm": True}])
@pytest.mark.parametrize(("draft_length", "num_slots"), [(1, 0), (LENGTH, 0), (0, 3), (3, 5)])
def test_greedy(model, params, images, changes, draft_length, num_slots):
    if changes:
        model = Captioner(dataclasses.replace(model.config, **changes))
        params = model.init(jax.random.key(3))
        head = params["decoder"]["head"]
        head["kernel"] = 0.5 * jax.random.normal(jax.random.key(4), head["kernel"].shape)
        head["bias"] = head["bias"].at[EOS_ID].set(4.0)
    mask_B = jnp.arange(len(images)) % 5 != 1
    options = DecodingOptions(max_length=LENGTH, min_length=2)
    expected = generate(model, params, images, options, mask_B=mask_B)
    options = dataclasses.replace(options, draft_length=draft_length, num_slots=num_slots)
    assert_same(generate(model, params, images, options, mask_B=mask_B), expected)
    assert len(set(np.asarray(expected.num_tokens_BS)[np.asarray(mask_B), 0].tolist())) > 1


def test_a_perfect_draft_takes_few_passes(model, params, images):
    """Without self-attention a parallel row says what a causal one says of no text before it."""
    decoder = params["decoder"]
    blocks = decoder["blocks"]
    out = jax.tree.map(jnp.zeros_like, blocks["self_attention"]["out"])
    blocks = {**blocks, "self_attention": {**blocks["self_attention"], "out": out}}
    tokens = {"embedding": jnp.zeros_like(decoder["token_embedding"]["embedding"])}
    params = {**params, "decoder": {**decoder, "blocks": blocks, "token_embedding": tokens}}
    rules = speculative.Rules(LENGTH, 3, len(images), False, 0, False, False)
    made = speculative._encode_and_write(
        model,
        params,
        images,
        jnp.arange(len(images)),
        jnp.ones(len(images), bool),
        jax.random.key(0),
        speculative.Numbers(*map(jnp.asarray, (1.0, 0, 1.0, 0.0))),
        rules,
    )
    np.testing.assert_array_equal(made.num_passes_B, -(-made.num_B // 3))
    assert made.num_passes_B.max() > 1


@pytest.mark.parametrize(
    ("draft_length", "num_slots", "fields"),
    [
        (1, 0, {"temperature": 3.0}),
        (2, 400, {"temperature": 4.0, "top_k": 12, "min_p": 0.01}),
        (0, 1000, {"temperature": 4.0, "top_p": 0.9}),
    ],
)
def test_draws_are_of_the_model(model, params, images, draft_length, num_slots, fields):
    """Texts of up to two tokens come as often as one token at a time would write them."""
    length, draws = 2, 4000
    memory_BPD = jnp.repeat(model.encode(params, images[:1]), draws, axis=0)
    options = DecodingOptions(max_length=length, **fields)
    by_rows = dataclasses.replace(options, draft_length=draft_length, num_slots=num_slots)
    texts = {}
    for name, asked in (("one by one", options), ("by rows", by_rows)):
        made = generate(model, params, memory_BPD, asked, key=jax.random.key(11))
        texts[name] = collections.Counter(map(tuple, np.asarray(made.tokens_BSL)[:, 0].tolist()))
    probs = exact_probabilities(model, params, images[:1], options, length)
    assert sum(probs.values()) == pytest.approx(1.0, abs=1e-4)
    for name, counts in texts.items():
        assert counts.keys() <= probs.keys(), name
        frequent = {text: p for text, p in probs.items() if p * draws >= 10}
        statistic = sum(
            (counts[text] - p * draws) ** 2 / (p * draws) for text, p in frequent.items()
        )
        # The 1 - 1e-4 quantile of chi-square, by Wilson and Hilferty.
        degrees = len(frequent) - 1
        bound = degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3
        assert degrees > 20 and statistic < bound, name


def exact_probabilities(model, params, images, options, length):
    """Text -> probability, by whole uncached passes."""
    memory_BPD = model.encode(params, images)
    probs, vocab = {(): 1.0}, model.config.vocab_size
    for position in range(length):
        grown = {text: p for text, p in probs.items() if EOS_ID in text}
        open_texts = [text for text in probs if EOS_ID not in text]
        inputs = np.zeros((len(open_texts), length), np.int32)
        for row, text in zip(inputs, open_texts, strict=True):
            row[1 : len(text) + 1] = text
        memories = jnp.repeat(memory_BPD, len(open_texts), axis=0)
        hidden_BLE = model.hidden(params, jnp.asarray(inputs), memories)
        logits_BV = model.logits(params, hidden_BLE)[:, position, :vocab]
        for text, logits in zip(open_texts, np.asarray(logits_BV, np.float64), strict=True):
            for token, p in enumerate(of_logits(logits / options.temperature, options)):
                if p > 0:
                    grown[(*text, token)] = probs[text] * p
        probs = grown
    return {(*text, *[0] * (length - len(text))): p for text, p in probs.items()}


def of_logits(logits, options):
    """What one token is drawn from: padding banned, then the k likeliest, or the first with p."""
    p = np.exp(logits - logits.max())
    p[0] = 0.0
    p /= p.sum()
    order = np.argsort(-p)
    if options.top_k:
        p[order[options.top_k :]] = 0.0
    if options.top_p < 1:
        p[order[np.cumsum(p[order]) - p[order] >= options.top_p]] = 0.0
    p[p < options.min_p * p.max()] = 0.0
    return p / p.sum()


@pytest.mark.parametrize("fields", [{"num_slots": 5}, {"num_slots": 5, "top_p": 0.9}])
def test_slots_alone_change_no_draw(model, params, images, fields):
    options = DecodingOptions(max_length=LENGTH, temperature=1.0, **fields)
    expected = generate(model, params, images, dataclasses.replace(options, num_slots=0))
    assert_same(generate(model, params, images, options), expected)


def test_draws_depend_on_the_image_alone(model, params, images):
    """Not on the slots, nor on the batch."""
    options = DecodingOptions(max_length=LENGTH, temperature=1.0, draft_length=3)
    expected = generate(model, params, images, options)
    refilled = dataclasses.replace(options, num_slots=2)
    assert_same(generate(model, params, images, refilled), expected)
    rows = jnp.arange(1, len(images), 2)
    made = generate(model, params, images[rows], options, index_B=rows)
    np.testing.assert_array_equal(made.tokens_BSL, np.asarray(expected.tokens_BSL)[rows])


@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(data=2, fsdp=2, tensor=2)], ids=str)
def test_on_a_mesh(model, params, images, shape):
    mesh, images = make_mesh(shape), images[:8]
    for fields in ({"draft_length": 3}, {"draft_length": 2, "temperature": 1.0}):
        options = DecodingOptions(max_length=LENGTH, **fields)
        expected = generate(model, params, images, options)
        with jax.set_mesh(mesh):
            placed = place_batch(
                mesh, {"image": np.asarray(images), "index": np.arange(8, dtype=np.int32)}
            )
            spread = place_tree(mesh, params, model.param_specs())
            made = generate(model, spread, placed["image"], options, index_B=placed["index"])
            with pytest.raises(UserError, match="num_slots=3 for a batch of 8 on a mesh"):
                generate(model, spread, placed["image"], dataclasses.replace(options, num_slots=3))
        assert_same(jax.device_get(made), jax.device_get(expected))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draft_length": -1}, "draft_length=-1: expected at least 1"),
        ({"num_slots": 4, "num_beams": 2}, "num_slots=4 is of greedy search and sampling"),
        ({"draft_length": 4, "guidance_scale": 2.0}, "guidance_scale=2.0 does not go together"),
        ({"draft_length": 4, "stop": ("a",)}, "stop=.* does not go together with draft_length"),
    ],
)
def test_what_does_not_go_together(fields, message):
    with pytest.raises(UserError, match=message):
        DecodingOptions(**fields)


def test_a_model_without_a_parallel_mode_drafts_nothing(model, params, images):
    causal = Captioner(dataclasses.replace(model.config, mask_token=False))
    with pytest.raises(UserError, match="draft_length=2: drafts need a model with a parallel mode"):
        generate(causal, params, images, DecodingOptions(draft_length=2))
    forced = jnp.full((len(images), 1), 3, jnp.int32)
    with pytest.raises(UserError, match="take no prefix"):
        generate(model, params, images, DecodingOptions(num_slots=2), forced_BL=forced)
