"""What may be chosen in the decoder: positions, QK-norm, the padding mask, the null memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch, place_tree
from capjax.models import Captioner
from capjax.models.rotary import rotate
from tests.models.conftest import random_params

EVERYTHING = {
    "decoder_posemb": "rotary",
    "decoder_qk_norm": True,
    "mask_padding": True,
    "null_memory": "learned",
}
# Decoder inputs whose last three positions are padding; the first 0 is no padding.
PADDED = np.array([[0, 5, 7, 0, 0, 0], [0, 9, 3, 0, 0, 0]], np.int32)


def names(tree) -> set[str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(tree)
    }


def test_parameters_of_the_defaults_and_of_each_option(config):
    decoder = {
        name for name in names(Captioner(config).abstract_params()) if name.startswith("decoder/")
    }
    block = {
        *(f"{norm}_norm/{name}" for norm in ("self", "cross", "mlp") for name in ("scale", "bias")),
        *(f"self_attention/{name}/kernel" for name in ("qkv", "out")),
        *(f"cross_attention/{name}/kernel" for name in ("query", "key_value", "out")),
        *(f"mlp/{name}/{part}" for name in ("up", "down") for part in ("kernel", "bias")),
    }
    outside = {"norm/scale", "norm/bias", "head/kernel", "head/bias", "token_embedding/embedding"}
    outside |= {"position_embedding"} | {f"blocks/{name}" for name in block}
    assert decoder == {f"decoder/{name}" for name in outside}

    def changes(**fields):
        changed = names(Captioner(dataclasses.replace(config, **fields)).abstract_params())
        before = names(Captioner(config).abstract_params())
        return changed - before, before - changed

    assert changes(mask_padding=True) == changes(decoder_posemb="rotary") == (set(), set())
    without_positions = changes(decoder_posemb="rotary", mask_token=False)
    assert without_positions == (set(), {"decoder/position_embedding"})
    assert changes(decoder_posemb="sincos2d") == (set(), {"decoder/position_embedding"})
    assert changes(null_memory="learned") == ({"decoder/null_memory"}, set())
    added, removed = changes(decoder_qk_norm=True)
    norms = {f"{kind}_attention/{of}_norm" for kind in ("self", "cross") for of in ("query", "key")}
    assert added == {f"decoder/blocks/{norm}/scale" for norm in norms} and not removed


def test_rotary_turns_pairs_and_shows_distances_alone():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 6))
    pairs = np.asarray(x[..., :3] + 1j * x[..., 3:])
    angles = np.arange(2, 7)[:, None, None] * 10_000.0 ** -(np.arange(3) / 3)
    turned = pairs * np.exp(1j * angles)
    want = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(rotate(x, jnp.arange(2, 7)), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rotate(x)[:, 0], x[:, 0])

    def products(start):
        positions = start + jnp.arange(5)
        return jnp.einsum("BLNK,BSNK->BNLS", rotate(x, positions), rotate(x[:, ::-1], positions))

    np.testing.assert_allclose(products(0), products(30), rtol=1e-4, atol=1e-4)
    assert rotate(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def rotary(config, batch):
    """(model, params, memory) with rotary positions."""
    model = Captioner(dataclasses.replace(config, decoder_posemb="rotary"))
    params = random_params(model.config)
    return model, params, model.encode(params, batch["image"])


def test_rotary_positions_tell_the_order_of_tokens(rotary):
    """A causal row without masks reads no position vector, and yet its order matters."""
    model, params, memory = rotary
    tokens = jnp.array([[0, 5, 7, 9, 2]])
    states = model.hidden(params, tokens, memory[:1])
    unused = params["decoder"] | {"position_embedding": jnp.full((6, 16), jnp.nan)}
    np.testing.assert_array_equal(
        model.hidden(params | {"decoder": unused}, tokens, memory[:1]), states
    )
    swapped = model.hidden(params, tokens[:, jnp.array([0, 2, 1, 3, 4])], memory[:1])
    assert jnp.abs(swapped - states)[0, 3:].max() > 1e-3


def test_rotary_masks_keep_their_place(rotary):
    """Equal inputs that see each other would all have the same state, whatever the angles."""
    model, params, memory = rotary
    states = model.parallel_hidden(params, memory, 6)
    distance = jnp.abs(states[:, 1:] - states[:, :-1]).max((0, 2))
    assert distance.min() > 0.1
    no_positions = params["decoder"] | {"position_embedding": jnp.zeros((6, 16))}
    states = model.parallel_hidden(params | {"decoder": no_positions}, memory, 6)
    np.testing.assert_allclose(states[:, 1:], states[:, :-1], atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [{"decoder_posemb": "rotary", "decoder_qk_norm": True}, EVERYTHING | {"scan": False}],
    ids=str,
)
def test_causal_positions_see_the_past_only(fields, config, batch):
    """By the gradient of each state with respect to the embedding of each position's token."""
    config = dataclasses.replace(config, **fields)
    model, params = Captioner(config), random_params(config)
    tokens = jnp.stack([jnp.arange(6) + 2, jnp.arange(6) + 9])

    @jax.jit
    def jacobian(table, images):
        def states(table):
            decoder = params["decoder"] | {"token_embedding": {"embedding": table}}
            hidden = model.hidden(
                params | {"decoder": decoder}, tokens, memory, jnp.array([False, True])
            )
            return jnp.sum(hidden * jnp.arange(1, 17)[None, None], -1)

        memory = model.encode(params, images)
        return jax.jacrev(states)(table)

    table = params["decoder"]["token_embedding"]["embedding"]
    moves = np.any(np.asarray(jacobian(table, batch["image"][:2])) != 0, -1)  # (B, L, V)
    np.testing.assert_array_equal(moves[0][:, tokens[0]], np.tri(6, dtype=bool))
    assert np.all(moves[1][:, tokens[1]])


def test_padding_is_masked_in_causal_rows_alone(config, batch):
    """By the gradient of each state with respect to each position's vector."""
    config = dataclasses.replace(config, mask_padding=True)
    model, params = Captioner(config), random_params(config)

    @jax.jit
    def jacobian(positions, images):
        def states(positions):
            decoder = params["decoder"] | {"position_embedding": positions}
            hidden = model.hidden(
                params | {"decoder": decoder},
                jnp.asarray(PADDED),
                memory,
                jnp.array([False, True]),
            )
            return jnp.sum(hidden * jnp.arange(1, 17)[None, None], -1)

        memory = model.encode(params, images)
        return jax.jacrev(states)(positions)

    positions = params["decoder"]["position_embedding"]
    moves = np.any(np.asarray(jacobian(positions, batch["image"][:2])) != 0, -1)  # (B, L, L)
    is_token = np.arange(6) < 3
    want = np.tri(6, dtype=bool) & (is_token[None] | np.eye(6, dtype=bool))
    np.testing.assert_array_equal(moves[0], want)
    assert np.all(moves[1])


def test_the_padding_mask_changes_states_at_padding_alone(config, params, batch):
    """Padding stands last, where no token of a causal row sees it: nothing that is scored moves."""
    tokens = jnp.asarray(PADDED)
    without = Captioner(config)
    memory = without.encode(params, batch["image"][:2])
    states = without.hidden(params, tokens, memory)
    with_mask = Captioner(dataclasses.replace(config, mask_padding=True))
    masked = with_mask.hidden(params, tokens, memory)
    np.testing.assert_allclose(masked[:, :3], states[:, :3], rtol=1e-5, atol=1e-5)
    assert np.all(np.abs(masked - states)[:, 4:].max(-1) > 1e-4)


@pytest.fixture(scope="module")
def decoded(config, batch):
    """(params, states step by step, states at once) with every option, on `PADDED`."""
    config = dataclasses.replace(config, **EVERYTHING)
    model, params = Captioner(config), random_params(config)
    tokens = jnp.asarray(PADDED)

    @jax.jit
    def both(params, images):
        memory = model.encode(params, images)
        memory = model.drop_memory(params, memory, jnp.array([False, True]))

        write, cache = model.start_decoding(params, [memory], batch=2, length=6)

        def step(cache, i):
            logits, _, cache = write(tokens[:, i, None], i, cache)
            return cache, logits[:, 0]

        steps = jax.lax.scan(step, cache, jnp.arange(6))[1]
        return steps.swapaxes(0, 1), model.logits(params, model.hidden(params, tokens, memory))

    return both(params, batch["image"][:2])


def test_cached_equals_teacher_forcing_up_to_padding(decoded):
    steps, at_once = decoded
    np.testing.assert_allclose(steps[:, :3], at_once[:, :3], rtol=1e-5, atol=1e-5)


def test_every_option_on_a_mesh(config, batch, assert_trees_close):
    config = dataclasses.replace(config, **EVERYTHING)
    model, params = Captioner(config), random_params(config)

    def loss(params, batch):
        memory = model.encode(params, batch["image"])
        memory = model.drop_memory(params, memory, batch["is_parallel"])
        mixed = model.hidden(params, batch["tokens"], memory, ~batch["is_parallel"])
        both = mixed + model.parallel_hidden(params, memory, 6)
        return jnp.sum(jnp.square(both) * jnp.sin(jnp.arange(96.0)).reshape(1, 6, 16))

    want = jax.device_get(jax.jit(jax.value_and_grad(loss))(params, batch))
    assert np.all(want[1]["decoder"]["null_memory"] != 0)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = place_tree(mesh, params, model.param_specs())
        rows = place_batch(mesh, jax.device_get(batch))
        found = jax.device_get(jax.jit(jax.value_and_grad(loss))(placed, rows))
    assert_trees_close(found, want, 2e-5)


@pytest.mark.parametrize("null_memory", ["zeros", "learned"])
def test_dropped_rows_see_the_null_memory(null_memory, config):
    model = Captioner(dataclasses.replace(config, null_memory=null_memory))
    params = model.init(jax.random.key(0))
    memory = jax.random.normal(jax.random.key(1), (3, 4, 32), jnp.bfloat16)
    is_dropped = jnp.array([True, False, True])
    found = model.drop_memory(params, memory, is_dropped)
    assert found.dtype == memory.dtype
    # As drawn, the learned vector is the memory of zeros.
    np.testing.assert_array_equal(found, jnp.where(is_dropped[:, None, None], 0, memory))
    if null_memory == "learned":
        assert params["decoder"]["null_memory"].shape == (32,)
        params["decoder"]["null_memory"] += jnp.arange(32.0)
        found = model.drop_memory(params, memory, is_dropped)
        np.testing.assert_array_equal(found[1], memory[1])
        for row in (0, 2):
            np.testing.assert_array_equal(found[row], np.tile(np.arange(32), (4, 1)))


def test_memory_holds_registers_and_class_token(config, batch):
    """The decoder reads the encoder's whole sequence; only patches are pooled to "gap"."""
    model = Captioner(dataclasses.replace(config, num_registers=3, pool="tok"))
    params = random_params(model.config)
    memory = model.encode(params, batch["image"])
    assert memory.shape == (8, 4 + 1 + 3, 32)
    assert model.hidden(params, batch["tokens"], memory).shape == (8, 6, 16)
    np.testing.assert_array_equal(model.pooled(params, memory), memory[:, 4])
    gap = Captioner(dataclasses.replace(config, num_registers=3))
    np.testing.assert_allclose(
        gap.pooled(params, memory[:, :7]), memory[:, :4].mean(1), rtol=1e-5, atol=1e-6
    )
    assert gap.flops_per_example() > Captioner(config).flops_per_example()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_posemb": "rope"}, "decoder_posemb='rope': choose one of"),
        ({"null_memory": "mean"}, "null_memory='mean': choose one of"),
        (
            {"decoder_posemb": "rotary", "decoder_width": 10},
            "decoder_width=10 over decoder_num_heads=2: rotary positions need",
        ),
        ({"decoder_posemb": "sincos2d", "decoder_width": 6}, "decoder_width=6: sincos2d needs"),
    ],
)
def test_bad_options_are_refused(config, fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **fields)
