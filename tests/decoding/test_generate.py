"""The compiled loop against teacher forcing, against uncached decoding, and across meshes."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.decoding import generate as generate_module
from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch, place_tree
from capjax.models.captioner import Captioner
from tests.decoding.conftest import First, generate

LENGTH = 12


@functools.partial(jax.jit, static_argnums=0)
def forced_logits(model, params, images, tokens_BL):
    """float32 [B, L, vocab_size] of the whole text in one uncached causal pass."""
    inputs_BL = jnp.pad(tokens_BL, ((0, 0), (1, 0)))[:, :-1]
    hidden = model.hidden(params, inputs_BL, model.encode(params, images), None)
    return model.logits(params, hidden)[..., : model.config.vocab_size]


def until_end(tokens_BL) -> np.ndarray:
    """bool [B, L]: positions up to the first EOS, itself included."""
    ended = np.cumsum(np.asarray(tokens_BL) == EOS_ID, axis=1)
    return (ended - (np.asarray(tokens_BL) == EOS_ID)) == 0


def assert_same(a: First, b: First, rows=slice(None)):
    np.testing.assert_array_equal(a.tokens_BL[rows], b.tokens_BL)
    np.testing.assert_allclose(a.logprobs_BL[rows], b.logprobs_BL, atol=2e-5)
    np.testing.assert_array_equal(a.num_tokens_B[rows], b.num_tokens_B)
    np.testing.assert_array_equal(a.finished_B[rows], b.finished_B)


@pytest.fixture(scope="module")
def greedy(model, params, images):
    return generate(model, params, images, max_length=LENGTH)


@pytest.fixture(scope="module")
def sampled(model, params, images):
    return generate(model, params, images, max_length=LENGTH, temperature=0.8)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_equals_teacher_forcing(model, params, images, greedy, sampled, temperature):
    made = sampled if temperature else greedy
    logits = forced_logits(model, params, images, made.tokens_BL) / (temperature or 1.0)
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    tokens, kept = np.asarray(made.tokens_BL), until_end(made.tokens_BL)
    chosen = np.take_along_axis(logprobs, tokens[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(made.logprobs_BL, np.where(kept, chosen, 0.0), atol=1e-5)
    if not temperature:
        best = logprobs[..., PAD_ID + 1 :].argmax(axis=2) + PAD_ID + 1
        np.testing.assert_array_equal(tokens[kept], best[kept])


def test_equals_brute_force_without_a_cache(model, params, images, greedy):
    tokens = np.zeros((len(images), LENGTH), np.int32)
    for position in range(LENGTH):
        logits = np.array(forced_logits(model, params, images, jnp.asarray(tokens)))
        best = logits[:, position, 1:].argmax(axis=1) + 1
        ended = (tokens == EOS_ID).any(axis=1)
        tokens[:, position] = np.where(ended, PAD_ID, best)
    np.testing.assert_array_equal(greedy.tokens_BL, tokens)


def test_what_follows_the_end_is_padding(greedy, sampled):
    for made in (greedy, sampled):
        tokens, kept = np.asarray(made.tokens_BL), until_end(made.tokens_BL)
        assert np.all(tokens[kept] != PAD_ID)
        assert np.all(tokens[~kept] == PAD_ID)
        assert np.all(np.asarray(made.logprobs_BL)[~kept] == 0)
        assert np.all(np.asarray(made.logprobs_BL)[kept] < 0)
        np.testing.assert_array_equal(made.num_tokens_B, kept.sum(axis=1))
        np.testing.assert_array_equal(made.finished_B, (tokens == EOS_ID).any(axis=1))


def test_a_low_temperature_is_greedy(model, params, images, greedy):
    cold = generate(model, params, images, max_length=LENGTH, temperature=1e-5)
    np.testing.assert_array_equal(cold.tokens_BL, greedy.tokens_BL)


def test_first_tokens_are_drawn_from_the_softmax(model, params, images):
    """Chi-square with 19 degrees of freedom; 43.8 is the 0.1 % point, and the seed is fixed."""
    num = 4096
    patches = jnp.repeat(model.encode(params, images[:1]), num, axis=0)
    made = generate(model, params, patches, max_length=1, temperature=1.3)
    logits = forced_logits(model, params, images[:1], jnp.zeros((1, 1), jnp.int32))[0, 0, 1:]
    expected = num * np.asarray(jax.nn.softmax(logits / 1.3), np.float64)
    counts = np.bincount(np.asarray(made.tokens_BL)[:, 0], minlength=len(expected) + 1)[1:]
    assert ((counts - expected) ** 2 / expected).sum() < 43.8


def test_each_position_draws_anew(model, params, images):
    """A flat distribution over 19 ids: 264 neighbours, 14 of them equal on average."""
    head = jax.tree.map(jnp.zeros_like, params["decoder"]["head"])
    flat = {**params, "decoder": {**params["decoder"], "head": head}}
    made = generate(
        model, flat, images, max_length=LENGTH, temperature=0.8, min_length=model.config.text_length
    )
    tokens = np.asarray(made.tokens_BL)
    assert np.sum(tokens[:, 1:] == tokens[:, :-1]) < 40


def test_draws_depend_on_seed_and_index_only(model, params, images, sampled):
    rows = np.array([5, 0, 17, 5])
    run = functools.partial(
        generate, model, params, max_length=LENGTH, temperature=0.8, index_B=jnp.asarray(rows)
    )
    few = run(images[rows])
    assert_same(sampled, few, rows)
    np.testing.assert_array_equal(few.tokens_BL[0], few.tokens_BL[3])
    one_image = jnp.repeat(images[5:6], len(images), axis=0)
    varied = generate(model, params, one_image, max_length=LENGTH, temperature=0.8)
    assert len({tuple(row) for row in np.asarray(varied.tokens_BL).tolist()}) > 3
    other_seed = run(images[rows], key=jax.random.key(1))
    assert np.any(np.asarray(other_seed.tokens_BL) != np.asarray(few.tokens_BL))


def test_encoded_patches_and_shorter_texts(model, params, images, greedy):
    short = generate(model, params, model.encode(params, images), max_length=5)
    np.testing.assert_array_equal(short.tokens_BL, greedy.tokens_BL[:, :5])
    np.testing.assert_array_equal(short.num_tokens_B, np.minimum(greedy.num_tokens_B, 5))
    np.testing.assert_array_equal(
        short.finished_B, greedy.finished_B & (np.asarray(greedy.num_tokens_B) <= 5)
    )


def test_min_length_puts_off_the_end(model, params, images, greedy):
    made = generate(model, params, images, max_length=LENGTH, min_length=4)
    assert np.min(made.num_tokens_B) > 4 > np.min(greedy.num_tokens_B)
    late = np.asarray(greedy.num_tokens_B) > 4
    np.testing.assert_array_equal(made.tokens_BL[late], greedy.tokens_BL[late])


class Counting(Captioner):
    """A captioner that reports each decoding step as it runs."""

    report: Callable = staticmethod(lambda index: None)

    def start_decoding(self, *args, **sizes):
        step, cache = super().start_decoding(*args, **sizes)

        def counted(tokens_BS, index, *rest):
            jax.debug.callback(type(self).report, index)
            return step(tokens_BS, index, *rest)

        return counted, cache


def test_the_loop_stops_at_the_last_end(model, params, images, greedy):
    """Also with rows that are left out: they do not hold it up."""
    steps = []
    Counting.report = staticmethod(lambda index: steps.append(int(index)))
    counting = Counting(model.config)
    lengths = np.asarray(greedy.num_tokens_B)
    for longest in (lengths.min(), np.sort(lengths)[len(lengths) // 2], lengths.max()):
        steps.clear()
        mask = jnp.asarray(lengths <= longest)
        made = generate(counting, params, images, max_length=LENGTH, mask_B=mask)
        jax.block_until_ready(made)
        jax.effects_barrier()
        assert sorted(steps) == list(range(longest))
        kept = np.where(np.asarray(mask)[:, None], greedy.tokens_BL, PAD_ID)
        np.testing.assert_array_equal(made.tokens_BL, kept)
        np.testing.assert_array_equal(made.num_tokens_B, np.where(mask, lengths, 0))


SPLIT_EVERY_WAY = MeshShape(replica=2, data=1, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("shape", "temperature"),
    [(MeshShape(data=8), 0.8), (SPLIT_EVERY_WAY, 0.8), (SPLIT_EVERY_WAY, 0.0)],
    ids=str,
)
def test_meshes_agree_with_one_device(model, params, images, greedy, sampled, shape, temperature):
    mesh = make_mesh(shape)
    batch = place_batch(mesh, {"image": np.asarray(images), "index": np.arange(len(images))})
    with jax.set_mesh(mesh):
        made = generate(
            model,
            place_tree(mesh, params, model.param_specs()),
            batch["image"],
            index_B=batch["index"],
            max_length=LENGTH,
            temperature=temperature,
        )
    assert made.tokens_BL.sharding.spec[0] == batch["image"].sharding.spec[0]
    assert_same(made, sampled if temperature else greedy)


def test_temperatures_and_keys_share_an_executable(model, params, images):
    compiled = generate_module._generate
    run = functools.partial(generate, model, params, images[:3], max_length=2)
    run(temperature=0.5)
    size = compiled._cache_size()
    run(temperature=2.0, key=jax.random.key(7), index_B=jnp.array([4, 5, 6]))
    run(temperature=0.1, min_length=1, mask_B=jnp.array([True, False, True]))
    assert compiled._cache_size() == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length=0: expected at least 1"),
        ({"max_length": 13}, "max_length=13: expected 1 to 12"),
        ({"max_length": 4, "temperature": -0.1}, "temperature=-0.1"),
        ({"max_length": 4, "temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_bad_options_are_refused(model, params, images, options, message):
    with pytest.raises(UserError, match=message):
        generate(model, params, images, **options)
