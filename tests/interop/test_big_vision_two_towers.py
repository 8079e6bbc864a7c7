"""Parity with big_vision's two towers: its SigLIP's weights in, its outputs and gradients out.

`tests/fixtures/big_vision_siglip.npz` was written by google-research/big_vision itself.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.interop.big_vision import read, to_arrays
from capjax.models import TwoTowers, TwoTowersConfig

FIXTURE = Path(__file__).parents[1] / "fixtures" / "big_vision_siglip.npz"


def assert_close(got, want, tolerance: float, name: str = "") -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, name
    assert np.max(np.abs(got - want) / (1 + np.abs(want))) < tolerance, name


@pytest.fixture(scope="module")
def parity():
    """The case, the configuration read from it, our outputs and our gradients."""
    with np.load(FIXTURE) as file:
        case = {name.removeprefix("siglip/"): file[name] for name in file.files}
    model_name, config, params, *_ = read(case)
    assert model_name == "two_towers"
    model = TwoTowers(config)

    def loss(params, images, tokens):
        image_BD = model.embed_image(params, model.encode(params, images))
        text_BD = model.embed_text(params, tokens)
        scale, bias = model.logit_scale_and_bias(params)
        logits_BB = scale * image_BD @ text_BD.T + bias
        signs_BB = 2 * jnp.eye(len(images)) - 1
        total = -jnp.sum(jax.nn.log_sigmoid(signs_BB * logits_BB), -1).mean()
        softmax = -(jnp.diag(jax.nn.log_softmax(logits_BB, 0)).mean())
        softmax -= jnp.diag(jax.nn.log_softmax(logits_BB, 1)).mean()
        return total, (image_BD, text_BD, logits_BB, softmax / 2)

    compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, outputs), grads = jax.device_get(compute(params, case["in/image"], case["in/labels"]))
    return case, config, (total, *outputs), grads


def test_config_is_read_from_the_weights(parity):
    case, config, _, _ = parity
    theirs = json.loads(str(case["config"]))
    image, text = theirs["image"], theirs["text"]
    assert config == TwoTowersConfig(
        image_size=12,
        patch_size=image["patch_size"][0],
        width=image["width"],
        depth=image["depth"],
        num_heads=image["num_heads"],
        mlp_dim=image["mlp_dim"],
        pool=image["pool_type"],
        vocab_size=text["vocab_size"],
        text_length=7,
        embedding_dim=theirs["out_dim"][1],
        logit_bias_init=theirs["bias_init"],
    )


def test_texts_of_siglip_2_are_padded_with_0(parity):
    case, config, _, _ = parity
    assert config.text_pad_id == 1
    params = {name: x for name, x in case.items() if name.startswith("params/")}
    gemma = np.broadcast_to(np.float32(0), (256_000, config.text_width))
    assert read(params | {"params/txt/Embed_0/embedding": gemma}).config.text_pad_id == 0


def test_outputs_equal_theirs(parity):
    case, _, outputs, _ = parity
    names = ("sigmoid_loss", "zimg", "ztxt", "logits", "softmax_loss")
    for name, found in zip(names, outputs, strict=True):
        assert_close(found, case[f"out/{name}"], 5e-6, name)


def test_gradients_equal_theirs(parity):
    case, config, _, grads = parity
    found = to_arrays(config, grads)
    assert {f"grad/{name}" for name in found} == {name for name in case if name.startswith("grad/")}
    for name, x in found.items():
        assert_close(x, case[f"grad/{name}"], 5e-6, name)
