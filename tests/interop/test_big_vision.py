"""Parity with big_vision's CapPa: its weights in, its outputs and gradients out.

`tests/fixtures/big_vision_cappa.npz` was written by google-research/big_vision itself: random
weights, inputs, outputs, gradients and statistics of its initialisation, for Cap and for CapPa.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.interop.big_vision import read, to_arrays
from capjax.models import Captioner, CaptionerConfig

FIXTURE = Path(__file__).parents[1] / "fixtures" / "big_vision_cappa.npz"
CASES = ("cap", "cappa")


def load_case(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURE) as file:
        return {k.removeprefix(f"{name}/"): file[k] for k in file.files if k.startswith(f"{name}/")}


def below(prefix: str, arrays: dict) -> dict:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def assert_close(got, want, tolerance: float, name: str = "") -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, name
    assert np.max(np.abs(got - want) / (1 + np.abs(want))) < tolerance, name


def shift_right(labels_BL):
    return jnp.pad(labels_BL, ((0, 0), (1, 0)))[:, :-1]


def caption_nll(logits_BLV, labels_BL):
    """Sum of nats and number of tokens of each caption."""
    logprobs_BLV = jax.nn.log_softmax(logits_BLV, -1)
    nll_BL = -jnp.take_along_axis(logprobs_BLV, labels_BL[..., None], -1)[..., 0]
    weights_BL = labels_BL != 0
    return jnp.sum(nll_BL * weights_BL, -1), jnp.sum(weights_BL, -1)


@pytest.fixture(scope="module", params=CASES)
def parity(request):
    """Every output that the fixture names, computed by our model from their weights in one jit."""
    case = load_case(request.param)
    _, config, params, *_ = read(case)
    model = Captioner(config)
    parallel = config.mask_token

    @jax.jit
    def compute(params, images, labels, class_labels, mixed):
        length, batch = labels.shape[1], len(labels)
        encoder = model.module(params).encoder
        stem = encoder.embed_patches(images)
        patches = model.encode(params, images)

        def logits(params, tokens, is_parallel=None):
            patches = model.encode(params, images)
            return model.logits(params, model.hidden(params, tokens, patches, is_parallel))

        def ar_loss(params):
            out = logits(params, shift_right(labels))
            total, count = caption_nll(out, labels)
            return jnp.mean(total / count), (out, total, total / count)

        def pa_loss(params):
            tokens = jnp.full_like(labels, model.mask_id)
            out = logits(params, tokens, jnp.ones(batch, bool))
            total, count = caption_nll(out, labels)
            return jnp.mean(total / count), out

        def score(label_row):
            rows = jnp.tile(label_row[None], (batch, 1))
            return -caption_nll(logits(params, shift_right(rows)), rows)[0]

        def decode(choose):
            write, cache = model.start_decoding(params, [patches], batch=batch, length=length)

            def step(carry, i):
                token, cache = carry
                out, _, cache = write(token[:, None], i, cache)
                out = out[:, 0]
                token = choose(i, out)
                return (token, cache), (out, token)

            start = (jnp.zeros(batch, jnp.int32), cache)
            _, (outs, tokens) = jax.lax.scan(step, start, jnp.arange(length))
            return outs.swapaxes(0, 1), tokens.T

        (loss, (ar_logits, ppl_sum, ppl_mean)), ar_grads = jax.value_and_grad(
            ar_loss, has_aux=True
        )(params)
        found = {
            "stem": stem,
            "with_posemb": encoder.add_positions(stem),
            "encoded": patches,
            "pre_logits": patches.mean(1),
            "ar_logits": ar_logits,
            "ar_loss": loss,
            "ppl_sum": ppl_sum,
            "ppl_mean": ppl_mean,
            "scores": jax.vmap(score, out_axes=1)(class_labels),
            "decode_logits": decode(lambda i, _: labels[:, i])[0],
            "greedy_tokens": decode(lambda _, out: jnp.argmax(out, -1).astype(jnp.int32))[1],
        }
        grads = {"ar": ar_grads}
        if parallel:
            (loss, pa_logits), grads["pa"] = jax.value_and_grad(pa_loss, has_aux=True)(params)
            tokens = jnp.where(mixed[:, None], model.mask_id, shift_right(labels))
            found |= {
                "pa_logits": pa_logits,
                "pa_loss": loss,
                "mixed_logits": logits(params, tokens, mixed),
            }
            total, count = caption_nll(found["mixed_logits"], labels)
            found["mixed_loss"] = jnp.mean(total / count)
        return found, grads

    mixed = case.get("out/mixed_is_parallel", np.zeros(len(case["in/labels"]), bool))
    inputs = (case["in/image"], case["in/labels"], case["in/class_labels"], mixed)
    found, grads = jax.device_get(compute(params, *inputs))
    return case, config, found, grads


def test_config_is_read_from_the_weights(parity):
    case, config, _, _ = parity
    theirs = json.loads(str(case["config"]))
    assert config == CaptionerConfig(
        image_size=12,
        patch_size=4,
        width=theirs["emb_dim"],
        depth=theirs["num_layers"],
        num_heads=theirs["num_heads"],
        mlp_dim=theirs["mlp_dim"],
        decoder_width=theirs["emb_dim"],
        decoder_depth=theirs["decoder_num_layers"],
        decoder_num_heads=theirs["num_heads"],
        decoder_mlp_dim=theirs["mlp_dim"],
        vocab_size=theirs["vocab_size"],
        text_length=theirs["seq_len"],
        mask_token=theirs["masked_pred_prob"] > 0,
    )


def test_outputs_equal_theirs(parity):
    case, config, found, _ = parity
    want = below("out/", case)
    np.testing.assert_array_equal(found.pop("greedy_tokens"), want.pop("greedy_tokens"))
    want.pop("mixed_is_parallel", None)
    want["stem"] = want["stem"].reshape(found["stem"].shape)  # theirs keeps the grid
    assert found.keys() == want.keys()
    for name, x in found.items():
        if name.endswith("logits") and name != "pre_logits":
            assert np.all(x[..., config.vocab_size :] == np.finfo(np.float32).min)
            x = x[..., : config.vocab_size]
        assert_close(x, want[name], 1e-6 if name.endswith("loss") else 5e-6, name)


def test_gradients_equal_theirs(parity):
    case, config, _, grads = parity
    for mode, grad in grads.items():
        want = below(f"grad/{mode}/", case)
        found = to_arrays(config, grad)
        assert found.keys() == want.keys()
        for name, x in found.items():
            assert_close(x, want[name], 5e-6, f"{mode} {name}")
        padded = grad["decoder"]["head"]["kernel"][:, config.vocab_size :]
        assert np.all(padded == 0)


def test_initial_spread_equals_theirs(parity):
    case, config, _, _ = parity
    model = Captioner(config)
    draws = [to_arrays(config, model.init(jax.random.key(seed))) for seed in range(8)]
    want = below("init_std/", case)
    assert draws[0].keys() == want.keys()
    for name, std in want.items():
        size = draws[0][name].size
        found = np.sqrt(np.mean([np.var(draw[name]) for draw in draws]))
        # Their figure is one draw: its relative error is about 1/sqrt(2 size), normal or uniform.
        assert abs(found - std) <= 4 * std / np.sqrt(2 * size), (name, found, std)
