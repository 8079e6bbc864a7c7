"""CoCa: sizes, laws of initialisation, what may see what, decoding, and the same on any mesh."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.decoding.score import score
from capjax.errors import UserError
from capjax.mesh import MeshShape, act_BLV, make_mesh, place_batch, place_tree, reshard
from capjax.models.coca import CoCa, CoCaConfig
from tests.decoding.conftest import generate

CONFIG = CoCaConfig(
    image_size=8,
    patch_size=4,
    width=32,
    depth=2,
    num_heads=4,
    mlp_dim=48,
    decoder_width=16,
    decoder_depth=3,
    decoder_num_heads=2,
    decoder_mlp_dim=32,
    decoder_bias=True,
    caption_queries=5,
    embedding_dim=24,
    vocab_size=21,
    text_length=6,
)
LENGTHS = np.array([6, 3, 1, 5, 4, 6, 2, 3])  # tokens of each caption, its end included


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    place = np.arange(6)[None]
    labels = np.where(place < LENGTHS[:, None] - 1, rng.integers(2, 21, (8, 6)), 1)
    labels = np.where(place < LENGTHS[:, None], labels, 0).astype(np.int32)
    rows = {
        "image": rng.integers(0, 256, (8, 8, 8, 3), np.uint8),
        "labels": labels,
        "inputs": np.pad(labels[:, :-1], ((0, 0), (1, 0))),
        "probe": rng.normal(size=(8, 24)).astype(np.float32),
    }
    return jax.tree.map(jnp.asarray, rows)


def random_params(config):
    """Of sizes that move everything: neither the head nor a bias is zero."""
    rng = np.random.default_rng(1)

    def draw(path, x):
        is_scale = jax.tree_util.keystr(path).endswith("scale']")
        return jnp.asarray(rng.normal(is_scale, 0.25, x.shape), jnp.float32)

    return jax.tree.map_with_path(draw, CoCa(config).abstract_params())


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def loss_and_gradient(config, params, batch):
    """In one jit, of a loss with a gradient everywhere; a mesh may be set."""
    model = CoCa(config)

    def loss(params, batch):
        memory = model.encode(params, batch["image"])
        hidden, text = model.hidden_and_text(params, batch["inputs"], memory)
        logits_BLV = model.logits(params, hidden)
        labels_BLV = reshard(jax.nn.one_hot(batch["labels"], logits_BLV.shape[-1]), act_BLV)
        nll_BL = jax.nn.logsumexp(logits_BLV, -1) - jnp.sum(logits_BLV * labels_BLV, -1)
        scale, bias = model.logit_scale_and_bias(params)
        cosine_B = jnp.sum(model.embed_image(params, memory) * text, -1) * scale + bias
        return jnp.mean(nll_BL) + jnp.mean(jnp.sin(cosine_B)) + jnp.mean(text * batch["probe"])

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, batch))


@pytest.fixture(scope="module")
def single(params, batch):
    return loss_and_gradient(CONFIG, params, batch)


def sized(**fields):
    sizes = {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072, "decoder_depth": 24}
    return CoCa(CoCaConfig(**sizes | fields))


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_parameters_of_the_published_size():
    """The paper: image encoder 86 M, decoder 297 M, in all 383 M; it leaves out the poolers."""
    model = sized(image_size=288, patch_size=18, vocab_size=64_000)
    params = model.abstract_params()
    assert round(count(params["encoder"]) / 1e6) == 86
    added = 2 * 4 * 768**2 + (256 + 1) * 768 + 2 * 2 * 768 + 2 * 768**2  # poolers, projections
    assert model.num_params() == count(params)  # no padding
    assert round((model.num_params() - added) / 1e6) == 383
    assert round(model.num_params() / 1e6, 1) == 388.7


def test_padding_is_not_counted():
    padded, whole = (sized(image_size=32, patch_size=16, vocab_size=n) for n in (120, 128))
    assert whole.num_params() - padded.num_params() == 8 * (2 * 768 + 1)
    assert count(whole.abstract_params()) == count(padded.abstract_params())


def test_flops_are_what_the_compiler_counts():
    """Forward, unrolled: a third of the count, but for element-wise work."""
    sizes = {"width": 128, "depth": 2, "num_heads": 2, "mlp_dim": 256, "decoder_depth": 3}
    model = sized(
        **sizes, image_size=224, patch_size=16, vocab_size=4096, caption_queries=64, scan=False
    )

    def forward(params, images, tokens):
        memory = model.encode(params, images)
        hidden, text = model.hidden_and_text(params, tokens, memory)
        return model.logits(params, hidden), text, model.embed_image(params, memory)

    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    compiled = jax.jit(forward).lower(model.abstract_params(), images, tokens).compile()
    assert 3 * compiled.cost_analysis()["flops"] == pytest.approx(
        model.flops_per_example(), rel=0.03
    )


def test_zeros_stand_for_the_encoders_sizes():
    config = CoCaConfig(
        image_size=8, patch_size=4, width=32, depth=5, num_heads=4, mlp_dim=48, vocab_size=21
    )
    sizes = (config.decoder_width, config.decoder_depth, config.decoder_mlp_dim)
    assert (*sizes, config.unimodal_depth, config.embedding_dim) == (32, 5, 48, 2, 32)
    assert config.mask_token is False
    assert CoCaConfig(**dataclasses.asdict(config)) == config


def expected_std(path: str, config: CoCaConfig) -> float:
    """Of what is drawn; 0 for a constant."""
    image, text = config.width, config.decoder_width
    width = text if path.startswith("decoder") else image
    mlp = config.decoder_mlp_dim if path.startswith("decoder") else config.mlp_dim
    if "norm/" in path or path.startswith("contrastive/") or "head/" in path:
        return 0.0
    if path.endswith("bias"):
        return 1e-6 if "mlp" in path else 0.0
    if "/mlp/" in path:
        return (2 / (width + mlp)) ** 0.5
    if "encoder/blocks/attention" in path:
        return (2 / (image + image)) ** 0.5
    if path == "encoder/patch_embedding/kernel":
        return (3 * config.patch_size**2) ** -0.5
    if path.endswith("position_embedding"):
        return width**-0.5
    if path.endswith(("queries", "class_token", "token_embedding/embedding")):
        return 1.0
    if path == "decoder/multimodal_blocks/cross_attention/key_value/kernel":
        return image**-0.5
    assert "attention/" in path or "projection" in path, path
    return width**-0.5


def test_initial_parameters_follow_their_laws():
    """Every one of them: open_clip left whole towers uninitialised for years."""
    config = dataclasses.replace(CONFIG, width=64, decoder_width=48, vocab_size=128)
    params = CoCa(config).init(jax.random.key(0))
    for path, x in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        std = expected_std(name, config)
        assert x.dtype == jnp.float32
        if std == 0:
            constant = config.logit_scale_init if "logit_scale" in name else name.endswith("scale")
            np.testing.assert_array_equal(x, np.full(x.shape, constant, np.float32), name)
        else:  # within five standard errors, that of a uniform or normal sample being below this
            assert np.std(x) == pytest.approx(std, rel=5 / math.sqrt(2 * x.size)), name
            assert abs(np.mean(x)) < 5 * std / math.sqrt(x.size), name
    heads = [np.ravel(x)[:48] for x in jax.tree.leaves(params) if x.size >= 48 and np.std(x) > 0]
    correlation = np.corrcoef(heads) - np.eye(len(heads))
    assert len(heads) > 20 and np.abs(correlation).max() < 0.75


def test_what_comes_out_of_initial_parameters(batch):
    """Every token equally likely; embeddings of length 1, and not all the same."""
    model = CoCa(CONFIG)
    params = model.init(jax.random.key(0))
    memory = model.encode(params, batch["image"])
    hidden, text = model.hidden_and_text(params, batch["inputs"], memory)
    assert np.all(np.std(memory, axis=1).mean(-1) > 0.05)  # the queries read different things
    np.testing.assert_allclose(
        jax.nn.logsumexp(model.logits(params, hidden), -1), np.log(21), rtol=1e-6
    )
    for embedding in (text, model.embed_image(params, memory)):
        assert embedding.dtype == jnp.float32
        np.testing.assert_allclose(jnp.linalg.norm(embedding, axis=-1), 1, rtol=1e-5)
    assert np.abs(text @ text.T - np.eye(8)).max() < 0.999
    scale, bias = model.logit_scale_and_bias(params)
    np.testing.assert_allclose((scale, bias), (1 / 0.07, 0), rtol=1e-6)


@pytest.fixture(scope="module")
def influence(params, batch):
    """Gradients, nonzero where something is seen, of hidden states and of text embeddings.

    Positions stand for the tokens at them, because the first input and padding have one id.
    """
    model = CoCa(CONFIG)

    @jax.jit
    def jacobian(params, inputs, images):
        memory = model.encode(params, images)

        def states(decoder, memory):
            hidden, text = model.hidden_and_text(
                params | {"decoder": params["decoder"] | decoder}, inputs, memory
            )
            weights = jnp.arange(1, 17)[None, None]
            return jnp.sum(hidden * weights, -1), jnp.sum(text * weights[0, :, :1], -1)

        names = ("position_embedding", "class_token")
        return jax.jacrev(states, (0, 1))({x: params["decoder"][x] for x in names}, memory)

    made = jacobian(params, batch["inputs"], batch["image"])
    return jax.tree.map(lambda x: np.any(np.asarray(x) != 0, -1), made)


def test_tokens_see_the_past_only(influence):
    for sees in influence[0][0]["position_embedding"]:
        np.testing.assert_array_equal(sees, np.tri(6, dtype=bool))


def test_no_token_sees_the_class_token(influence):
    assert not np.any(influence[0][0]["class_token"])
    assert np.all(influence[1][0]["class_token"])


def test_the_class_token_sees_every_real_token_and_no_padding(influence):
    """Its inputs are a 0 and the tokens but for the last of a full row."""
    is_real = np.arange(6)[None] < np.minimum(LENGTHS + 1, 6)[:, None]
    np.testing.assert_array_equal(influence[1][0]["position_embedding"], is_real)


def test_hidden_states_see_their_image_and_the_text_embedding_none(influence):
    sees = influence[0][1]
    for i in range(8):
        assert np.all(sees[i, :, i]) and not np.any(np.delete(sees[i], i, axis=1))
    assert not np.any(influence[1][1])


def test_class_token_changes_no_hidden_state_and_embed_text_is_the_training_pass(params, batch):
    model = CoCa(CONFIG)
    memory = model.encode(params, batch["image"])
    hidden, text = model.hidden_and_text(params, batch["inputs"], memory)
    np.testing.assert_allclose(
        model.hidden(params, batch["inputs"], memory), hidden, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(model.embed_text(params, batch["labels"]), text)
    short = model.embed_text(params, batch["labels"][1:3, :4])  # less padding, the same vector
    np.testing.assert_allclose(short, text[1:3], rtol=1e-5, atol=1e-6)


def test_the_image_embedding_stands_on_the_caption_memory(params, batch):
    """The cascade: what the contrastive loss learns passes through the caption pooler."""
    model = CoCa(CONFIG)

    def loss(params):
        embedding = model.embed_image(params, model.encode(params, batch["image"]))
        return jnp.sum(embedding * batch["probe"])

    gradient = jax.jit(jax.grad(loss))(params)
    for name in ("encoder", "caption_pooler", "contrastive_pooler", "image_projection"):
        assert all(np.any(x != 0) for x in jax.tree.leaves(gradient[name])), name
    assert not any(np.any(x != 0) for x in jax.tree.leaves(gradient["decoder"]))


@pytest.mark.parametrize("null", ["zeros", "learned"])
def test_memory_of_dropped_images(null):
    model = CoCa(dataclasses.replace(CONFIG, null_memory=null))
    params = random_params(model.config)
    memory = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5, 32)), jnp.float32)
    is_dropped = np.arange(8) % 3 == 0
    found = model.drop_memory(params, memory, jnp.asarray(is_dropped))
    want = params["decoder"].get("null_memory", jnp.zeros(32))
    np.testing.assert_array_equal(found[is_dropped], np.broadcast_to(want, (3, 5, 32)))
    np.testing.assert_array_equal(found[~is_dropped], memory[~is_dropped])


def forced_logprobs(model, params, images, tokens_BL):
    inputs_BL = jnp.pad(tokens_BL, ((0, 0), (1, 0)))[:, :-1]
    hidden = model.hidden(params, inputs_BL, model.encode(params, images))
    logits = model.logits(params, hidden)[..., : model.config.vocab_size]
    logprobs_BL = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens_BL[..., None], 2)[..., 0]
    return jnp.where(tokens_BL == 0, 0.0, logprobs_BL)


@pytest.mark.parametrize(
    "fields", [{}, {"decoder_posemb": "sincos2d", "decoder_qk_norm": True, "scan": False}], ids=str
)
def test_cached_decoding_equals_teacher_forcing(fields, batch):
    model = CoCa(dataclasses.replace(CONFIG, **fields))
    params = random_params(model.config)
    made = generate(model, params, batch["image"], max_length=6)
    assert np.all(made.logprobs_BL[:, 0] < 0)
    want = jax.jit(functools.partial(forced_logprobs, model))(
        params, batch["image"], made.tokens_BL
    )
    np.testing.assert_allclose(made.logprobs_BL, want, atol=1e-5)
    np.testing.assert_allclose(
        score(model, params, batch["image"], made.tokens_BL), want.sum(1), atol=2e-5
    )


def test_captions_on_a_mesh(params, batch):
    model = CoCa(CONFIG)
    want = generate(model, params, batch["image"], max_length=6)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = place_tree(mesh, params, model.param_specs())
        images = place_batch(mesh, {"image": np.asarray(batch["image"])})["image"]
        found = generate(model, placed, images, max_length=6)
    np.testing.assert_array_equal(found.tokens_BL, want.tokens_BL)
    np.testing.assert_allclose(found.logprobs_BL, want.logprobs_BL, atol=1e-5)


@pytest.mark.parametrize(
    "shape",
    [
        MeshShape(data=8),
        MeshShape(data=1, fsdp=8),
        MeshShape(data=1, fsdp=4, tensor=2),
        MeshShape(data=2, fsdp=2, tensor=2),
    ],
    ids=str,
)
def test_loss_and_gradient_on_a_mesh(shape, single, params, batch, assert_trees_close):
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        placed = place_tree(mesh, params, CoCa(CONFIG).param_specs())
        found = loss_and_gradient(CONFIG, placed, place_batch(mesh, jax.device_get(batch)))
    assert_trees_close(found, single, 1e-5)


@pytest.mark.parametrize("fields", [{"scan": False}, {"remat": "full"}], ids=str)
def test_scan_and_remat_change_nothing(fields, single, params, batch, assert_trees_close):
    found = loss_and_gradient(dataclasses.replace(CONFIG, **fields), params, batch)
    assert_trees_close(found, single, 2e-5)


def test_bfloat16_is_close(params, batch):
    def forward(dtype):
        model = CoCa(dataclasses.replace(CONFIG, dtype=dtype))
        memory = model.encode(params, batch["image"])
        hidden, text = model.hidden_and_text(params, batch["inputs"], memory)
        assert memory.dtype == hidden.dtype == dtype
        return model.logits(params, hidden)[..., :21], text, model.embed_image(params, memory)

    for found, want in zip(forward("bfloat16"), forward("float32"), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, want, atol=0.1)


def test_every_large_parameter_is_split_over_fsdp():
    model = CoCa(CONFIG)
    specs, shapes = jax.tree.leaves(model.param_specs()), model.abstract_params()
    for (path, x), spec in zip(jax.tree.leaves_with_path(shapes), specs, strict=True):
        name = jax.tree_util.keystr(path)
        if x.ndim > 1 and "bias" not in name:
            assert "fsdp" in spec or "norm" in name, (name, spec)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unimodal_depth": 3}, "unimodal_depth=3 of decoder_depth=3"),
        ({"unimodal_depth": 0, "decoder_depth": 1}, "unimodal_depth=0 of decoder_depth=1"),
        ({"decoder_num_heads": 3}, "decoder_width=16 is not a multiple of decoder_num_heads=3"),
        ({"caption_queries": 0}, "caption_queries=0: expected 1"),
        ({"embedding_dim": -1}, "embedding_dim=-1: expected 1"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"decoder_posemb": "rotary"}, "decoder_posemb='rotary': choose one of"),
        ({"null_memory": "ones"}, "null_memory='ones': choose one of"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_bad_inputs_are_refused(params, batch):
    model = CoCa(CONFIG)
    memory = model.encode(params, batch["image"])
    with pytest.raises(UserError, match="CoCa has no parallel mode"):
        model.hidden(params, batch["inputs"], memory, jnp.ones(8, bool))
    long = jnp.zeros((8, 7), jnp.int32)
    for call in (
        lambda: model.hidden(params, long, memory),
        lambda: model.hidden_and_text(params, long, memory),
        lambda: model.embed_text(params, long),
        lambda: model.start_decoding(params, [memory], batch=8, length=7),
    ):
        with pytest.raises(UserError, match="7 tokens, but text_length=6"):
            call()
