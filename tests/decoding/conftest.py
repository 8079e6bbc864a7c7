"""A tiny captioner with weights that make captions of many lengths, for the decoding tests."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.checkpoint import Checkpointer, RunInfo
from capjax.data.images import ImagePreprocessing
from capjax.data.tokenizer import EOS_ID, Tokenizer
from capjax.decoding import generate as generate_module
from capjax.decoding.generate import Generated
from capjax.decoding.options import DecodingOptions
from capjax.models.captioner import Captioner, CaptionerConfig

CONFIG = CaptionerConfig(
    image_size=16,
    patch_size=8,
    width=32,
    depth=1,
    num_heads=2,
    mlp_dim=64,
    decoder_depth=2,
    vocab_size=21,
    text_length=12,
)


def with_random_head(params, key):
    """The parameters with weights that make captions differ and mostly end.

    The head is not zero, the end is likely, and positions matter (else greedy texts go in circles).
    """
    head_key, position_key = jax.random.split(key)
    decoder = params["decoder"]
    head = {
        "kernel": 0.7 * jax.random.normal(head_key, decoder["head"]["kernel"].shape),
        "bias": decoder["head"]["bias"].at[EOS_ID].set(2.5),
    }
    position = jax.random.normal(position_key, decoder["position_embedding"].shape)
    return {**params, "decoder": {**decoder, "head": head, "position_embedding": position}}


class First(NamedTuple):
    """The first caption of each image."""

    tokens_BL: jax.Array
    logprobs_BL: jax.Array
    num_tokens_B: jax.Array
    finished_B: jax.Array


def first(made: Generated) -> First:
    return First(
        made.tokens_BSL[:, 0],
        made.logprobs_BSL[:, 0],
        made.num_tokens_BS[:, 0],
        made.finish_BS[:, 0] == 1,
    )


def generate(
    model, params, inputs, *, max_length, temperature=0.0, min_length=0, **beside
) -> First:
    """One caption an image, greedy or drawn."""
    options = DecodingOptions(max_length=max_length, temperature=temperature, min_length=min_length)
    return first(generate_module.generate(model, params, inputs, options, **beside))


@pytest.fixture(scope="package")
def model() -> Captioner:
    return Captioner(CONFIG)


@pytest.fixture(scope="package")
def params(model, images):
    """Parameters whose greedy captions have many lengths: some end early, some are cut."""
    initial = model.init(jax.random.key(0))
    for seed in range(50):
        params = with_random_head(initial, jax.random.key(seed))
        made = generate(model, params, images, max_length=CONFIG.text_length)
        lengths = set(made.num_tokens_B.tolist())
        if len(lengths) >= 5 and min(lengths) <= 3 and not made.finished_B.all():
            return params
    return pytest.fail("no seed gives greedy captions of many lengths")


@pytest.fixture(scope="package")
def images() -> jax.Array:
    """uint8 [24, 16, 16, 3]: noise of different brightness."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (24, 16, 16, 3))
    return jnp.asarray(noise * rng.random((24, 1, 1, 3)), jnp.uint8)


TEXTS = ["a red cat", "a blue dog on a mat", "two green birds", "the sun", "a dog and a cat"]
STEPS = (3, 12)


@pytest.fixture(scope="package")
def run_directory(tmp_path_factory):
    """A workdir with the checkpoints of two steps; the older one has other parameters."""
    tokenizer = Tokenizer.train(TEXTS, 290)
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    preprocessing = ImagePreprocessing(image_size=config.image_size, mode="pad")
    run = RunInfo(
        config={"model": {"captioner": dataclasses.asdict(config)}, "seed": 5},
        preprocessing=dataclasses.asdict(preprocessing),
        tokenizer_model=tokenizer.model_bytes,
        pixels_by=preprocessing.made_by(),
    )
    workdir = tmp_path_factory.mktemp("run")
    initial = Captioner(config).init(jax.random.key(0))
    with Checkpointer(workdir / "checkpoints", run=run) as checkpointer:
        for step in STEPS:
            params = with_random_head(initial, jax.random.key(step))
            checkpointer.save(step, {"params": params}, {"examples_seen": 0})
    return workdir
