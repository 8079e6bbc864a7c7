"""Models over one set of parameters: what they share, what they may not, and what is kept of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.coca import CoCa, CoCaConfig
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.image_tower import ImageTower
from capjax.models.towers import Towers, towers_from_dict
from capjax.models.two_towers import TwoTowers, TwoTowersConfig

ENCODER = {
    "image_size": 16,
    "patch_size": 8,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 32,
    "pool": "map",
}
TEXT = {"vocab_size": 40, "text_length": 6}
CAPTIONER = Captioner(CaptionerConfig(**ENCODER, **TEXT, decoder_depth=1))
TWO_TOWERS = TwoTowers(TwoTowersConfig(**ENCODER, **TEXT, text_depth=1))
COCA = CoCa(CoCaConfig(**ENCODER, **TEXT, caption_queries=3))
IMAGE = ImageTower(ImageEncoderConfig(**ENCODER))
BOTH = Towers(captioner=CAPTIONER, two_towers=TWO_TOWERS)


def test_the_first_model_draws_what_it_would_alone_and_the_encoder_is_its():
    key = jax.random.key(0)
    params, alone = BOTH.init(key), CAPTIONER.init(key)
    assert params.keys() == {
        "encoder",
        "decoder",
        "image_head",
        "text_encoder",
        "contrastive",
    }
    for name in alone:
        jax.tree.map(np.testing.assert_array_equal, params[name], alone[name])
    assert jax.tree.structure(params) == jax.tree.structure(BOTH.abstract_params())
    assert jax.tree.structure(params) == jax.tree.structure(BOTH.param_specs())


def test_what_is_shared_counts_once():
    encoder = sum(x.size for x in jax.tree.leaves(BOTH.abstract_params()["encoder"]))
    assert BOTH.num_params() == CAPTIONER.num_params() + TWO_TOWERS.num_params() - encoder
    alone = Towers(captioner=CAPTIONER).flops_per_example()
    assert alone == CAPTIONER.flops_per_example()
    text = BOTH.flops_per_example() - alone
    assert 0 < text < TWO_TOWERS.flops_per_example()


def test_every_model_reads_its_own_of_the_shared_parameters():
    params = BOTH.init(jax.random.key(0))
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8))
    memory = BOTH.encode(params, image)
    np.testing.assert_array_equal(memory, TWO_TOWERS.encode(params, image))
    assert BOTH.generator is CAPTIONER and BOTH.embedder is TWO_TOWERS
    assert TWO_TOWERS.embed_image(params, memory).shape == (2, 16)
    assert BOTH.encode_image(params, image).shape == (2, 4, 16)


@pytest.mark.parametrize(
    "towers",
    [
        BOTH,
        Towers(two_towers=TWO_TOWERS),
        Towers(coca=COCA),
        Towers(image_encoder=IMAGE),
    ],
)
def test_a_checkpoint_can_say_which_models_they_are(towers):
    assert towers_from_dict(json.loads(json.dumps(towers.to_dict()))) == towers
    params = towers.init(jax.random.key(0))
    images = jnp.zeros((1, 16, 16, 3), jnp.uint8)
    assert towers.encode_image(params, images).shape == (1, 4, 16)


def test_models_that_do_not_go_together_are_refused():
    wide = TwoTowers(dataclasses.replace(TWO_TOWERS.config, mlp_dim=64, qk_norm=True))
    for others, message in [
        ({"captioner": CAPTIONER, "two_towers": wide}, "differ in mlp_dim, qk_norm"),
        ({"captioner": CAPTIONER, "coca": COCA}, "go with no other model"),
        ({"two_towers": TWO_TOWERS, "image_encoder": IMAGE}, "go with no other model"),
        ({}, "no model"),
    ]:
        with pytest.raises(UserError, match=message):
            Towers(**others)
