"""Parameters of another run: chosen subtrees to the bit, positions resized, all else refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh
from capjax.models import Captioner, CaptionerConfig
from capjax.models.resize import resize_position_embedding
from capjax.models.two_towers import TwoTowers, TwoTowersConfig
from capjax.training.patterns import by_name
from capjax.training.warm_start import warm_start

ENCODER = {"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32}
TEXT = {"vocab_size": 30, "text_length": 6}
CAPTIONER = Captioner(CaptionerConfig(image_size=8, **ENCODER, **TEXT))
LARGER = Captioner(CaptionerConfig(image_size=12, **ENCODER, **TEXT))
TOWERS = TwoTowers(TwoTowersConfig(image_size=8, **ENCODER, **TEXT))
GROWN = "encoder/position_embedding"


def drawn(model, seed: int):
    """Other values in every array, those that start as constants too."""
    params = jax.tree.map(np.asarray, model.init(jax.random.key(seed)))
    return jax.tree.map(lambda x: x + np.float32(seed), params)


@pytest.mark.parametrize(("source", "target"), [(CAPTIONER, TOWERS), (TOWERS, CAPTIONER)])
def test_an_encoder_goes_from_one_model_into_the_other(source, target):
    loaded, fresh = drawn(source, 1), target.init(jax.random.key(0))
    params, names = warm_start(fresh, loaded, include=("encoder",))
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert names == sorted(f"encoder/{name}" for name in by_name(fresh["encoder"]))
    for name, x in by_name(params).items():
        expected = by_name(loaded if name in names else fresh)[name]
        np.testing.assert_array_equal(x, expected, err_msg=name)


def test_subtrees_and_what_is_left_out_of_them():
    loaded, fresh = drawn(CAPTIONER, 1), CAPTIONER.init(jax.random.key(0))
    _, names = warm_start(
        fresh, loaded, include=("decoder/blocks", "encoder"), exclude=(".*/bias", "encoder/blocks")
    )
    assert all(name.startswith(("decoder/blocks/", "encoder/")) for name in names)
    assert not any(name.endswith("bias") or "encoder/blocks" in name for name in names)
    assert {"decoder/blocks/mlp/up/kernel", "encoder/norm/scale"} < set(names)
    assert set(warm_start(fresh, loaded)[1]) == set(by_name(fresh))


def test_positions_are_resized_and_arrays_keep_their_place():
    loaded = drawn(CAPTIONER, 1)
    with jax.set_mesh(make_mesh(MeshShape(fsdp=4, tensor=2))):
        fresh = LARGER.init(jax.random.key(0))
        params, names = warm_start(fresh, jax.tree.map(jnp.asarray, loaded))
    assert set(names) == set(by_name(fresh))
    for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(fresh), strict=True):
        assert new.sharding == old.sharding and new.dtype == old.dtype and new.shape == old.shape
    expected = by_name(loaded) | {GROWN: resize_position_embedding(by_name(loaded)[GROWN], 2, 3)}
    for name, x in by_name(params).items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)


def test_positions_of_longer_captions_go_on_as_drawn_and_of_shorter_ones_stop():
    longer = Captioner(CaptionerConfig(image_size=8, **ENCODER, **TEXT | {"text_length": 9}))
    name = "decoder/position_embedding"
    loaded, short = drawn(CAPTIONER, 1), by_name(drawn(CAPTIONER, 1))[name]
    with jax.set_mesh(make_mesh(MeshShape(fsdp=4, tensor=2))):
        fresh = longer.init(jax.random.key(0))
        params, names = warm_start(fresh, loaded)
    assert set(names) == set(by_name(fresh))
    found, was = by_name(params)[name], by_name(fresh)[name]
    assert found.sharding == was.sharding and found.dtype == was.dtype
    np.testing.assert_array_equal(found, np.concatenate([short, np.asarray(was)[6:]]))
    params, _ = warm_start(CAPTIONER.init(jax.random.key(0)), drawn(longer, 1))
    np.testing.assert_array_equal(by_name(params)[name], by_name(drawn(longer, 1))[name][:6])


def test_a_mask_token_more_or_less_changes_no_other_row():
    """128 tokens fill a block of lanes; with a mask token there are two."""
    sizes = {"image_size": 8, **ENCODER, **TEXT, "vocab_size": 128}
    masked, plain = (
        Captioner(CaptionerConfig(**sizes, mask_token=is_on)) for is_on in (True, False)
    )
    for source, target in ((masked, plain), (plain, masked)):
        fresh, loaded = target.init(jax.random.key(0)), drawn(source, 1)
        params, names = warm_start(fresh, loaded, vocab_size=128)
        assert set(names) == set(by_name(fresh))
        rows, was, theirs = (
            by_name(x)["decoder/token_embedding/embedding"] for x in (params, fresh, loaded)
        )
        np.testing.assert_array_equal(rows[:128], theirs[:128])
        np.testing.assert_array_equal(rows[128:], was[128:])
        with pytest.raises(UserError, match=r"token_embedding/embedding \(\d+, 16\) instead of"):
            warm_start(fresh, loaded, vocab_size=100)


def test_weights_of_another_type_are_cast():
    loaded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), drawn(CAPTIONER, 1))
    params, _ = warm_start(CAPTIONER.init(jax.random.key(0)), loaded)
    for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(loaded), strict=True):
        assert new.dtype == jnp.float32
        np.testing.assert_array_equal(new, old.astype(np.float32))


def test_everything_that_does_not_fit_is_named():
    other = Captioner(CaptionerConfig(image_size=8, **ENCODER | {"mlp_dim": 16}, **TEXT))
    fresh = CAPTIONER.init(jax.random.key(0))
    loaded = drawn(other, 1)
    del loaded["encoder"]["norm"]
    loaded["encoder"]["class_token"] = np.zeros((1, 16), np.float32)
    with pytest.raises(UserError) as error:
        warm_start(fresh, loaded, include=("encoder",))
    for part in (
        "not in what is loaded: encoder/norm/bias, encoder/norm/scale; ",
        "not in this model: encoder/class_token; ",
        "encoder/blocks/mlp/up/kernel (2, 16, 16) instead of (2, 16, 32)",
        "encoder/blocks/mlp/down/kernel (2, 16, 16) instead of (2, 32, 16)",
        "warm_start.include and warm_start.exclude",
    ):
        assert part in str(error.value)
    assert "decoder" not in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"warm_start.include='encoer'.*did you mean encoder\?"):
        warm_start(fresh, loaded, include=("encoer",))


def test_to_take_nothing_is_an_error():
    fresh = CAPTIONER.init(jax.random.key(0))
    with pytest.raises(UserError, match=r"warm_start.exclude=\('enc.*',\) leaves nothing of what"):
        warm_start(fresh, fresh, include=("encoder",), exclude=("enc.*",))


def test_positions_of_a_text_encoder_are_neither_resized_nor_continued():
    """It may pool the last one, or attend to all."""
    longer = TwoTowers(TwoTowersConfig(image_size=8, **ENCODER, **TEXT | {"text_length": 9}))
    with pytest.raises(
        UserError, match=r"text_encoder/position_embedding \(6, 16\) instead of \(9"
    ):
        warm_start(longer.init(jax.random.key(0)), drawn(TOWERS, 1))
