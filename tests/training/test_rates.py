"""Layer-wise decay in closed form, factors by pattern, and what patterns match."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capjax.errors import UserError
from capjax.training.optimizer import OptimizerConfig, make_optimizer
from capjax.training.patterns import by_name, matching, stop_gradients
from capjax.training.rates import rate_factors

NAMES = {
    "encoder/patch_embedding/kernel": (2, 2, 3, 4),
    "encoder/position_embedding": (9, 4),
    "encoder/class_token": (1, 4),
    "encoder/blocks/mlp/up/kernel": (3, 4, 8),
    "encoder/blocks/mlp_norm/scale": (3, 4),
    "encoder/norm/scale": (4,),
    "decoder/blocks/mlp/up/kernel": (2, 4, 8),
    "image_head/projection/kernel": (4, 4),
}
PARAMS = {name: jnp.ones(shape) for name, shape in NAMES.items()}


def test_layer_decay_in_closed_form():
    factors = rate_factors(PARAMS, 0.5, ())
    for name in ("encoder/patch_embedding/kernel", "encoder/position_embedding"):
        assert factors[name] == factors["encoder/class_token"] == 0.5**4
    blocks = factors["encoder/blocks/mlp/up/kernel"]
    np.testing.assert_array_equal(blocks, np.reshape([0.5**3, 0.5**2, 0.5], (3, 1, 1)))
    assert factors["encoder/blocks/mlp_norm/scale"].shape == (3, 1)
    for name in ("encoder/norm/scale", "decoder/blocks/mlp/up/kernel"):
        assert factors[name] == 1


def test_the_first_multiplier_that_matches_counts():
    multipliers = (("encoder/blocks", 0.1), ("encoder", 0.5), (".*/scale", 3.0))
    factors = rate_factors(PARAMS, 1.0, multipliers)
    assert (
        factors["encoder/blocks/mlp/up/kernel"] == factors["encoder/blocks/mlp_norm/scale"] == 0.1
    )
    assert factors["encoder/class_token"] == factors["encoder/norm/scale"] == 0.5
    assert factors["decoder/blocks/mlp/up/kernel"] == 1
    both = rate_factors(PARAMS, 0.5, (("encoder", 10.0),))
    np.testing.assert_allclose(both["encoder/blocks/mlp_norm/scale"][:, 0], [1.25, 2.5, 5])
    assert both["encoder/class_token"] == 0.625


@pytest.mark.parametrize("name", ["adamw", "big_vision_adafactor"])
def test_factors_scale_a_step_and_the_decay_of_weights(name):
    fields = {"name": name, "schedule": "constant", "learning_rate": 0.1, "weight_decay": 0.5}
    plain = OptimizerConfig(**fields)
    scaled = OptimizerConfig(**fields, layer_decay=0.5, multipliers=(("decoder", 0.25),))
    gradients = jax.tree.map(lambda x: 0.01 * x, PARAMS)

    def first_updates(config):
        tx, _ = make_optimizer(config, 10, PARAMS)
        return tx.update(gradients, tx.init(PARAMS), PARAMS)[0]

    one, other = first_updates(plain), first_updates(scaled)
    factors = rate_factors(PARAMS, 0.5, (("decoder", 0.25),))
    for key, update in one.items():
        # big_vision's decay does not follow the factors.
        decay = 0.5 * key.endswith("/kernel") if name == "big_vision_adafactor" else 0.0
        np.testing.assert_allclose(
            other[key] + decay, factors[key] * (update + decay), rtol=1e-4, atol=1e-7
        )


def test_patterns_match_whole_names_or_what_stands_above():
    names = ["encoder/norm/scale", "encoder/norm/bias", "encoder_norm/scale", "decoder/bias"]
    assert matching(["encoder"], names, "f") == set(names[:2])
    assert matching(["encoder/.*"], names, "f") == set(names[:2])
    assert matching([".*/bias", "encoder_norm"], names, "f") == set(names[1:])
    assert matching(["decoder|encoder/norm"], names, "f") == {names[0], names[1], names[3]}
    assert by_name({"a": {"b": 1}, "c": 2}) == {"a/b": 1, "c": 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze": ("encodr",)}, r"optimizer.freeze='encodr'.*did you mean encoder\?"),
        ({"freeze": ("ncoder/blocks/ml",)}, "did you mean encoder/blocks/mlp"),
        ({"freeze": ("xyz",)}, "the names begin with decoder, encoder, image_head"),
        ({"freeze": ("(",)}, r"optimizer.freeze='\(': not a regular expression"),
        ({"freeze": (".*",)}, "leaves nothing to train"),
        ({"multipliers": (("decoder/haed", 0.1),)}, "optimizer.multipliers='decoder/haed'"),
    ],
)
def test_patterns_that_do_not_do_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimizerConfig(**fields), 10, PARAMS)


def test_frozen_parameters_keep_every_bit_and_have_no_state():
    zeros = {"encoder/negative_zero": jnp.array([-0.0, 0.0, jnp.nan])}
    params = PARAMS | zeros
    tx, _ = make_optimizer(OptimizerConfig(freeze=("encoder/.*",), schedule="constant"), 10, params)
    state = tx.init(params)
    trained = {"decoder/blocks/mlp/up/kernel", "image_head/projection/kernel"}
    assert optax.tree.get(state, "mu").keys() == optax.tree.get(state, "nu").keys() == trained
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
    for name, new in jax.jit(optax.apply_updates)(params, updates).items():
        same = np.asarray(new).tobytes() == np.asarray(params[name]).tobytes()
        assert same == (name not in trained), name


def test_frozen_gradients_are_not_in_the_norm_that_is_clipped():
    gradients = {
        n: jnp.full_like(x, 1e6 if n.startswith("enc") else 1e-3) for n, x in PARAMS.items()
    }
    tx, _ = make_optimizer(OptimizerConfig(freeze=("encoder",), b1=0.0), 10)
    _, state = tx.update(gradients, tx.init(PARAMS), PARAMS)
    for moment in optax.tree.get(state, "mu").values():
        np.testing.assert_allclose(moment, 1e-3, rtol=1e-5)


def test_no_gradient_is_computed_for_what_is_frozen():
    def loss(params):
        held = stop_gradients(params, ("encoder/.*",))
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(held))

    for name, gradient in jax.grad(loss)(PARAMS).items():
        expected = 0.0 if name.startswith("encoder/") else np.cos(1.0)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    assert "cos" in str(jax.make_jaxpr(jax.grad(loss))(PARAMS))
    encoder = {name: x for name, x in PARAMS.items() if name.startswith("encoder/")}
    jaxpr = jax.make_jaxpr(jax.grad(lambda part: loss(PARAMS | part)))(encoder)
    assert "cos" not in str(jaxpr)
