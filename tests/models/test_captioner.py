"""Sizes, initialisation, and what a position may see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.models import Captioner, CaptionerConfig


def sized(width, depth, num_heads, mlp_dim, decoder_depth, patch_size, **fields):
    return Captioner(
        CaptionerConfig(
            image_size=224,
            patch_size=patch_size,
            width=width,
            depth=depth,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            decoder_depth=decoder_depth,
            vocab_size=32_000,
            **fields,
        )
    )


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ((384, 12, 6, 1536, 6, 16), 60.46),
        ((512, 12, 8, 2048, 6, 16), 96.33),
        ((768, 12, 12, 3072, 6, 16), 191.67),
        ((1024, 24, 16, 4096, 6, 14), 469.50),
        ((1024, 24, 16, 4096, 12, 14), 570.18),
        ((1408, 40, 16, 6144, 12, 14), 1499.42),
    ],
)
def test_parameters_of_the_published_sizes(size, millions):
    """Counts of the reference implementation at 224 px; the vocabulary's padding is left out."""
    assert round(sized(*size).num_params() / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("size", "gigaflops"),
    [
        ((384, 12, 6, 1536, 6, 16), 39.5),
        ((768, 12, 12, 3072, 6, 16), 142.5),
        ((1024, 24, 16, 4096, 6, 14), 551.4),
    ],
)
def test_flops_of_the_published_sizes(size, gigaflops):
    assert sized(*size).flops_per_example() / 1e9 == pytest.approx(gigaflops, abs=0.05)


def test_flops_are_what_the_compiler_counts():
    """Forward, unrolled: a third of the count, but for element-wise work."""
    model = sized(128, 2, 2, 256, 2, 16, scan=False)

    def forward(params, images, tokens):
        hidden = model.hidden(params, tokens, model.encode(params, images))
        return model.logits(params, hidden)

    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    compiled = jax.jit(forward).lower(model.abstract_params(), images, tokens).compile()
    assert 3 * compiled.cost_analysis()["flops"] == pytest.approx(
        model.flops_per_example(), rel=0.03
    )


def test_cap_has_no_row_for_the_mask(config):
    with_mask = Captioner(config)
    without = Captioner(dataclasses.replace(config, mask_token=False))
    assert with_mask.num_params() - without.num_params() == config.decoder_width
    assert with_mask.mask_id == config.vocab_size


def test_initial_parameters(config, batch):
    model = Captioner(config)
    params = model.init(jax.random.key(0))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert abstract == model.abstract_params()
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    decoder = params["decoder"]
    assert decoder["token_embedding"]["embedding"].shape == (128, 16)
    assert np.all(decoder["token_embedding"]["embedding"][22:] == 0)
    assert np.all(np.any(decoder["token_embedding"]["embedding"][:22] != 0, -1))
    # Layers are drawn independently, and so are query, key and value.
    kernel = decoder["blocks"]["self_attention"]["qkv"]["kernel"]
    assert kernel.shape == (3, 16, 2, 3, 8)
    assert not np.any(kernel[0] == kernel[1])
    assert not np.any(kernel[..., 0, :] == kernel[..., 1, :])
    heads = [np.ravel(x)[:100] for x in jax.tree.leaves(params)]
    drawn = [head for head in heads if head.size == 100 and np.std(head) > 0]
    correlation = np.corrcoef(drawn) - np.eye(len(drawn))
    assert len(drawn) > 12 and np.abs(correlation).max() < 0.5
    # With a head of zeros every token is equally likely.
    patches = model.encode(params, batch["image"])
    logits = model.logits(params, model.hidden(params, batch["tokens"], patches))
    assert np.all(logits[..., :21] == 0)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, -1), np.log(21), rtol=1e-6)


def test_padded_logits_and_the_head(config, params, batch):
    model = Captioner(config)
    hidden = model.hidden(params, batch["tokens"], model.encode(params, batch["image"]))
    logits = model.logits(params, hidden)
    assert logits.shape == (8, 6, 128)
    assert np.all(logits[..., 21:] < -1e38)
    assert np.all(np.isfinite(logits))
    kernel, bias = model.output_head(params)
    np.testing.assert_allclose(
        (hidden @ kernel + bias[None, None])[..., :21], logits[..., :21], rtol=1e-5, atol=1e-5
    )


def test_uint8_images_are_scaled_on_the_device(config, params, batch):
    model = Captioner(config)
    floats = batch["image"].astype(jnp.float32) / 127.5 - 1
    assert floats.min() == -1 and floats.max() == 1
    np.testing.assert_array_equal(
        model.encode(params, batch["image"]), model.encode(params, floats)
    )


@pytest.fixture(scope="module")
def influence(config, params, batch):
    """(example, t, s): whether the state at position t moves with the token at position s.

    Read off the gradient with respect to the embedding: each position has a token of its own.
    """
    model = Captioner(config)
    tokens_BL = jnp.stack([jnp.arange(6) + 2, jnp.arange(6) + 9])

    @jax.jit
    def jacobian(params, images):
        patches = model.encode(params, images)

        def states(table, patches):
            decoder = params["decoder"] | {"token_embedding": {"embedding": table}}
            is_parallel = jnp.array([False, True])
            hidden = model.hidden(params | {"decoder": decoder}, tokens_BL, patches, is_parallel)
            return jnp.sum(hidden * jnp.arange(1, 17)[None, None], -1)

        table = params["decoder"]["token_embedding"]["embedding"]
        return jax.jacrev(states, (0, 1))(table, patches)

    by_row, by_patch = jacobian(params, batch["image"][:2])
    by_token = np.any(np.asarray(by_row) != 0, -1)  # (B, L, V)
    return np.stack([by_token[i][:, tokens_BL[i]] for i in range(2)]), by_token, by_patch


def test_causal_positions_see_the_past_only(influence):
    np.testing.assert_array_equal(influence[0][0], np.tri(6, dtype=bool))


def test_parallel_positions_see_each_other(influence):
    assert np.all(influence[0][1])


def test_every_position_sees_every_patch_of_its_image_only(influence):
    moves = np.any(np.asarray(influence[2]) != 0, -1)  # (B, L, B, P)
    for i in range(2):
        assert np.all(moves[i, :, i])
        assert not np.any(moves[i, :, 1 - i])
    assert not np.any(influence[1][0][:, 9:15])  # nor the other caption


def test_modes_are_chosen_per_example(config, params, batch):
    model = Captioner(config)
    tokens = batch["tokens"]

    @jax.jit
    def states(params, images, is_parallel):
        return model.hidden(params, tokens, model.encode(params, images), is_parallel)

    mixed = states(params, batch["image"], batch["is_parallel"])
    ones = states(params, batch["image"], jnp.ones(8, bool))
    causal = states(params, batch["image"], None)
    assert 0 < batch["is_parallel"].sum() < 8
    want = np.where(batch["is_parallel"][:, None, None], ones, causal)
    np.testing.assert_allclose(mixed, want, rtol=1e-5, atol=1e-6)
    assert np.abs(ones - causal).max() > 0.01


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"posemb": "rope"}, "posemb='rope': choose one of"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"remat": "some"}, "remat='some'"),
        ({"image_size": 9}, "image_size=9 is not a multiple of patch_size=4"),
        ({"num_heads": 5}, "width=32 is not a multiple of num_heads=5"),
        ({"decoder_num_heads": 3}, "decoder_width=16 is not a multiple of decoder_num_heads=3"),
        ({"depth": 0}, "depth=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"posemb": "sincos2d", "decoder_width": 6}, "decoder_width=6: sincos2d"),
    ],
)
def test_bad_configurations_are_refused(config, fields, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        dataclasses.replace(config, **fields)


def test_bad_inputs_are_refused(config, params, batch):
    model = Captioner(config)
    with pytest.raises(UserError, match=r"expected \(batch, 8, 8, 3\)"):
        model.encode(params, jnp.zeros((2, 16, 16, 3), jnp.uint8))
    patches = model.encode(params, batch["image"])
    with pytest.raises(UserError, match="7 tokens, but text_length=6"):
        model.hidden(params, jnp.zeros((8, 7), jnp.int32), patches)
    with pytest.raises(UserError, match="7 tokens, but text_length=6"):
        model.start_decoding(params, [patches], batch=8, length=7)


def test_parameters_may_be_numpy_arrays(config, params, batch):
    model = Captioner(config)
    patches = model.encode(jax.device_get(params), batch["image"])
    want = model.hidden(params, batch["tokens"], patches)
    found = model.hidden(jax.device_get(params), batch["tokens"], patches)
    np.testing.assert_array_equal(found, want)


def test_equal_configurations_are_equal_models(config):
    assert Captioner(config) == Captioner(dataclasses.replace(config))
    assert hash(Captioner(config)) == hash(Captioner(dataclasses.replace(config)))
