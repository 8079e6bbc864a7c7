"""The language model: what it may see, its prompt, and decoding step by step as the whole text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from capjax.errors import UserError
from capjax.mesh import BATCH, MeshShape, make_mesh, place_tree
from capjax.models.grouped_attention import turn
from capjax.models.language_model import LanguageModel, LanguageModelConfig
from tests.models.test_cache import descend

LENGTH, ROWS, BATCH_SIZE = 5, 3, 4
ENDS = (0, 1, 2, 7)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = LanguageModelConfig(
        vocab_size=21,
        width=16,
        depth=2,
        num_heads=4,
        num_kv_heads=2,
        head_width=6,
        mlp_dim=24,
        text_length=200,
        start_id=2,
    )
    return LanguageModel(config)


@pytest.fixture(scope="module")
def params(model):
    """Large enough that attention is far from even."""
    drawn = model.init(jax.random.key(0))
    return jax.tree.map(lambda x: 1.5 * x, drawn)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens_BL):
    return model.logits(params, model.hidden(params, tokens_BL))


@functools.partial(jax.jit, static_argnums=0)
def decode(model, params, tokens_BSL, history_LBSL):
    """Logits (L, B, S, V), position by position."""
    batch, rows, length = tokens_BSL.shape
    step, cache = model.start_decoding(params, batch=batch, length=length, num_rows=rows)

    def body(cache, x):
        index, tokens_BS, ancestors_BSL = x
        logits_BSV, _, cache = step(tokens_BS, index, cache, ancestors_BSL)
        return cache, logits_BSV

    inputs = (jnp.arange(length), tokens_BSL.transpose(2, 0, 1), history_LBSL)
    return jax.lax.scan(body, cache, inputs)[1]


@pytest.fixture(scope="module")
def rows():
    """(inputs [B, S, L] of texts that go on from one another's, the whole texts, history)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 21, (BATCH_SIZE, ROWS, LENGTH)).astype(np.int32)
    tokens[:, :, 0] = 0  # as a captioner starts
    texts, history = descend(tokens, rng.integers(0, ROWS, tokens.shape))
    return jnp.asarray(tokens), jnp.asarray(texts), jnp.asarray(history)


def test_neighbours_turn_and_distances_alone_show():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 3, 6))
    pairs = np.asarray(x[..., ::2] + 1j * x[..., 1::2])
    angles = np.arange(2, 7)[:, None, None, None] * 500.0 ** -(np.arange(3) / 3)
    turned = pairs * np.exp(1j * angles)
    want = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    np.testing.assert_allclose(turn(x, jnp.arange(2, 7), 500.0), want, rtol=1e-5, atol=1e-5)


def test_a_position_sees_what_is_before_it(model, params):
    tokens = jnp.asarray([[2, 5, 7, 9, 11, 13]])
    before = logits(model, params, tokens)
    after = logits(model, params, tokens.at[0, 3].set(4))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.all(np.abs(before - after)[0, 3:, :21].max(-1) > 1e-3)
    assert np.all(np.asarray(before)[..., 21:] == np.finfo(np.float32).min)


def test_equal_heads_of_a_group_are_one_head(model, params):
    """With keys and values repeated to a head for each query, the function is the same."""
    many = LanguageModel(dataclasses.replace(model.config, num_kv_heads=4))
    attention = params["blocks"]["attention"]
    depth, width, _, _, head = attention["query"]["kernel"].shape
    repeated = {name: jnp.repeat(attention[name]["kernel"], 2, axis=2) for name in ("key", "value")}
    wide = {
        "query": {"kernel": attention["query"]["kernel"].reshape(depth, width, 4, 1, head)},
        "out": {"kernel": attention["out"]["kernel"].reshape(depth, 4, 1, head, width)},
    } | {name: {"kernel": x} for name, x in repeated.items()}
    other = params | {"blocks": params["blocks"] | {"attention": wide}}
    tokens = jnp.asarray([[2, 5, 7, 9]])
    np.testing.assert_allclose(
        logits(many, other, tokens), logits(model, params, tokens), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("num", [1, 70])
def test_a_prompt_is_as_if_it_stood_in_each_text(model, params, rows, num):
    """For a prompt of one token, and for one longer than the step of its padding."""
    rng = np.random.default_rng(num)
    prompt = rng.integers(0, 21, num).astype(np.int32)
    texts = np.asarray(rows[1]).reshape(-1, LENGTH)[:, 1:]
    whole = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], 1)
    want = logits(model, params, jnp.asarray(whole))[:, num - 1 :]
    prompted = model.read_prompt(params, prompt)
    first = np.full((len(texts), 1), prompt[-1])
    found = logits(model, prompted, jnp.asarray(np.concatenate([first, texts], 1)))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=2e-5)
    again = model.read_prompt(prompted, prompt)  # replaces the other, does not follow it
    jax.tree.map(np.testing.assert_array_equal, prompted, again)


@pytest.mark.parametrize("prompt", [(), (3, 1, 4, 1, 5)])
def test_step_by_step_as_the_whole_text(model, params, rows, prompt):
    """Also where rows go on from one another's: at the last position every ancestor was asked."""
    tokens, texts, history = rows
    if prompt:
        params = model.read_prompt(params, np.array(prompt, np.int32))
    first = model.prompt(params).last
    assert first == (prompt or (2,))[-1]

    def want(texts):
        inputs = texts.reshape(-1, LENGTH).at[:, 0].set(first)
        return logits(model, params, inputs).reshape(BATCH_SIZE, ROWS, LENGTH, -1)

    found = decode(model, params, tokens, history)
    np.testing.assert_allclose(found[-1], want(texts)[:, :, -1], rtol=1e-4, atol=2e-5)
    found = decode(model, params, tokens, None)
    np.testing.assert_allclose(found, want(tokens).transpose(2, 0, 1, 3), rtol=1e-4, atol=2e-5)


def test_rows_on_a_mesh(model, params, rows):
    tokens, _, history = rows
    params = model.read_prompt(params, np.array([3, 1, 4], np.int32))
    want = decode(model, params, tokens, history)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    tokens, history = jax.device_get((tokens, history))
    with jax.set_mesh(mesh):
        tokens = jax.device_put(tokens, NamedSharding(mesh, P(BATCH, None, None)))
        history = jax.device_put(history, NamedSharding(mesh, P(None, BATCH, None, None)))
        specs = model.param_specs() | {"prompt": jax.tree.map(lambda _: P(), params["prompt"])}
        found = decode(model, place_tree(mesh, params, specs), tokens, history)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=2e-5)


def test_ends_are_one_and_nothing_is_lost(model):
    captioner = LanguageModel(dataclasses.replace(model.config, end_ids=ENDS))
    raw = jax.random.normal(jax.random.key(1), (2, 3, 128)).at[..., 21:].set(-1e30)
    before = np.asarray(jax.nn.softmax(raw, -1))
    after = np.asarray(jax.nn.softmax(captioner.caption_logits(raw), -1))
    np.testing.assert_allclose(after[..., 1], before[..., list(ENDS)].sum(-1), rtol=1e-5)
    assert np.all(after[..., [0, 2, 7]] == 0)
    others = [i for i in range(21) if i not in ENDS]
    np.testing.assert_allclose(after[..., others], before[..., others], rtol=1e-5)


def test_other_sizes_are_refused(model, params):
    def changed(**fields):
        return dataclasses.replace(model.config, **fields)

    with pytest.raises(UserError, match="num_kv_heads=3: expected a divisor of num_heads=4"):
        changed(num_kv_heads=3)
    with pytest.raises(UserError, match="head_width=5"):
        changed(head_width=5)
    with pytest.raises(UserError, match="dtype='float16'"):
        changed(dtype="float16")
    with pytest.raises(UserError, match="token 21: expected 0 to 20"):
        changed(end_ids=(0, 1, 21))
    with pytest.raises(UserError, match=r"end_ids=\(2, 7\): expected 0 and 1 among them"):
        changed(end_ids=(2, 7))
    with pytest.raises(UserError, match=r"201 tokens with the prompt, but .* at most 200"):
        model.read_prompt(params, np.zeros(201, np.int32))
    with pytest.raises(UserError, match="201 tokens"):
        model.start_decoding(params, batch=1, length=201)
