"""The models against a second implementation, in NumPy and float64, from the published equations.

It reads big_vision's names, so it also checks the converter, for what the fixtures do not hold:
towers of other widths, depths and heads, biases in the decoder, fixed positions, every pooling.
The reference itself is checked against what big_vision wrote.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from capjax.interop.big_vision import read, to_arrays
from capjax.interop.compare import TOLERANCE, activation_lines, activations, sample_inputs
from capjax.interop.mapping import Weights
from capjax.interop.reference import reference_activations
from capjax.models import Captioner, CaptionerConfig, TwoTowers, TwoTowersConfig
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.image_tower import ImageTower

FIXTURES = Path(__file__).parents[1] / "fixtures"
IMAGE = {"image_size": 12, "patch_size": 4, "width": 16, "depth": 3, "num_heads": 4, "mlp_dim": 24}
DECODER = {
    "decoder_width": 8,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "decoder_mlp_dim": 20,
    "decoder_bias": True,
    "vocab_size": 30,
    "text_length": 5,
}
TEXT = {
    "text_width": 12,
    "text_depth": 2,
    "text_num_heads": 3,
    "text_mlp_dim": 20,
    "vocab_size": 30,
    "text_length": 5,
}
MODELS = {"captioner": Captioner, "two_towers": TwoTowers, "image_encoder": ImageTower}
CASES = {
    "captioner": CaptionerConfig(**IMAGE, **DECODER),
    "captioner, fixed positions": CaptionerConfig(**IMAGE, **DECODER, posemb="sincos2d"),
    "captioner, plain": CaptionerConfig(
        **IMAGE, **DECODER | {"decoder_bias": False}, mask_token=False
    ),
    "two_towers, map": TwoTowersConfig(**IMAGE, **TEXT, pool="map"),
    "two_towers, tok": TwoTowersConfig(
        **IMAGE, **TEXT, pool="tok", image_projection=True, embedding_dim=20
    ),
    "two_towers, gap": TwoTowersConfig(**IMAGE, **TEXT, posemb="sincos2d", logit_bias_init=None),
    "image_encoder, gap": ImageEncoderConfig(**IMAGE),
    "image_encoder, tok": ImageEncoderConfig(**IMAGE, pool="tok"),
    "image_encoder, map": ImageEncoderConfig(**IMAGE, pool="map", posemb="sincos2d"),
}


@pytest.mark.parametrize("case", CASES)
def test_activations_equal_the_reference(case):
    config, name = CASES[case], case.split(",")[0]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.4 * rng.standard_normal(x.shape)).astype(np.float32),
        MODELS[name](config).abstract_params(),
    )
    inputs = sample_inputs(12, getattr(config, "text_length", 0), getattr(config, "vocab_size", 0))
    wanted = reference_activations(to_arrays(config, params), name, *inputs)
    found = activations(Weights(name, config, params), *inputs)
    lines = activation_lines(found, wanted, "the reference", TOLERANCE)
    assert len(lines) == len(wanted) >= 2
    assert lines[0].startswith(f"{next(iter(wanted))} [2x")


def test_the_reference_equals_big_vision():
    with np.load(FIXTURES / "big_vision_siglip.npz") as file:
        case = {name.removeprefix("siglip/"): file[name] for name in file.files}
    arrays = {k.removeprefix("params/"): x for k, x in case.items() if k.startswith("params/")}
    inputs = (case["in/image"], case["in/labels"])
    found = reference_activations(arrays, "two_towers", *inputs)
    for name, wanted in (("image embedding", "zimg"), ("text embedding", "ztxt")):
        np.testing.assert_allclose(found[name], case[f"out/{wanted}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["cap", "cappa"])
def test_the_reference_equals_big_vision_captioner(name):
    with np.load(FIXTURES / "big_vision_cappa.npz") as file:
        case = {k.removeprefix(f"{name}/"): file[k] for k in file.files if k.startswith(f"{name}/")}
    arrays = to_arrays(*read(case)[1:3])
    found = reference_activations(arrays, "captioner", case["in/image"], case["in/labels"])
    want = {"image encoder": "encoded", "causal logits": "ar_logits"}
    if name == "cappa":
        want["parallel logits"] = "pa_logits"
    assert found.keys() == want.keys()
    for key, x in found.items():
        np.testing.assert_allclose(x, case[f"out/{want[key]}"], rtol=5e-6, atol=5e-6)
