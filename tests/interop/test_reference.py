"""The model against a second implementation, in NumPy and float64, from the published equations.

It reads big_vision's names, so it also checks the converter, for what the fixture does not hold:
a decoder of another width, depth and number of heads, biases in the decoder, fixed positions.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest

from capjax.interop.big_vision import captioner_to_arrays
from capjax.models import Captioner, CaptionerConfig

CONFIG = CaptionerConfig(
    image_size=12,
    patch_size=4,
    width=16,
    depth=3,
    num_heads=4,
    mlp_dim=24,
    decoder_width=8,
    decoder_depth=2,
    decoder_num_heads=2,
    decoder_mlp_dim=20,
    decoder_bias=True,
    vocab_size=30,
    text_length=5,
)


def layer_norm(x, p, name):
    x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * p[f"{name}/scale"]
    return y + p.get(f"{name}/bias", 0)


def attention(x, memory, p, name, visible=None):
    def heads(x, part):
        kernel = p[f"{name}/{part}/kernel"]
        return np.einsum("...d,dhk->...hk", x, kernel) + p.get(f"{name}/{part}/bias", 0)

    query, key, value = heads(x, "query"), heads(memory, "key"), heads(memory, "value")
    logits = np.einsum("qhk,shk->hqs", query, key) / math.sqrt(query.shape[-1])
    if visible is not None:
        logits = np.where(visible, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqs,shk->qhk", weights, value)
    return np.einsum("qhk,hkd->qd", mixed, p[f"{name}/out/kernel"]) + p.get(f"{name}/out/bias", 0)


def mlp(x, p, name):
    x = x @ p[f"{name}/Dense_0/kernel"] + p.get(f"{name}/Dense_0/bias", 0)
    x = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x @ p[f"{name}/Dense_1/kernel"] + p.get(f"{name}/Dense_1/bias", 0)


def positions(rows, columns, width):
    frequencies = [1e4 ** (-i / (width // 4 - 1)) for i in range(width // 4)]
    return np.array(
        [
            [f(x * w) for x in (column, row) for f in (math.sin, math.cos) for w in frequencies]
            for row in range(rows)
            for column in range(columns)
        ]
    )


def caption_logits(config, p, image, tokens, is_parallel):
    """Logits (L, V) of one example: a float image (H, W, 3) and decoder inputs (L,)."""
    size, grid = config.patch_size, config.image_size // config.patch_size
    patches = [
        image[size * i : size * (i + 1), size * j : size * (j + 1)].ravel()
        for i in range(grid)
        for j in range(grid)
    ]
    kernel = p["encoder/embedding/kernel"].reshape(-1, config.width)
    x = np.array(patches) @ kernel + p["encoder/embedding/bias"]
    learned = config.posemb == "learn"
    x = x + (p["encoder/pos_embedding"][0] if learned else positions(grid, grid, config.width))
    for i in range(config.depth):
        name = f"encoder/Transformer/encoderblock_{i}"
        y = layer_norm(x, p, f"{name}/LayerNorm_0")
        x = x + attention(y, y, p, f"{name}/MultiHeadDotProductAttention_0")
        x = x + mlp(layer_norm(x, p, f"{name}/LayerNorm_1"), p, f"{name}/MlpBlock_0")
    encoded = layer_norm(x, p, "encoder/Transformer/encoder_norm")

    length = len(tokens)
    places = p["pos_embedding_decoder"][0] if learned else positions(1, 5, config.decoder_width)
    x = p["decoder/EmbedTargets/embedding"][tokens] + places[:length]
    visible = np.ones((length, length), bool) if is_parallel else np.tri(length, dtype=bool)
    for i in range(config.decoder_depth):
        name = f"decoder/EncDecBlock{i}"
        y = layer_norm(x, p, f"{name}/LayerNorm1")
        x = x + attention(y, y, p, f"{name}/SelfAttn", visible)
        y = layer_norm(x, p, f"{name}/LayerNorm2")
        x = x + attention(y, encoded, p, f"{name}/CrossAttn")
        x = x + mlp(layer_norm(x, p, f"{name}/LayerNorm3"), p, f"{name}/MLP")
    x = layer_norm(x, p, "decoder/LayerNorm")
    return x @ p["decoder/LogitsDense/kernel"] + p["decoder/LogitsDense/bias"]


@pytest.mark.parametrize("length", [5, 3])
@pytest.mark.parametrize(
    "fields",
    [{}, {"posemb": "sincos2d"}, {"decoder_bias": False, "mask_token": False}],
    ids=str,
)
def test_logits_equal_the_reference(fields, length):
    config = dataclasses.replace(CONFIG, **fields)
    model = Captioner(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.4 * rng.standard_normal(x.shape)).astype(np.float32), model.abstract_params()
    )
    images = rng.uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)
    tokens = rng.integers(0, config.num_embeddings, (2, length)).astype(np.int32)
    is_parallel = np.array([False, True])

    @jax.jit
    def logits(params, *args):
        images, tokens, is_parallel = args
        hidden = model.hidden(params, tokens, model.encode(params, images), is_parallel)
        return model.logits(params, hidden)[..., : config.vocab_size]

    arrays = captioner_to_arrays(config, params)
    arrays = {name: x.astype(np.float64) for name, x in arrays.items()}
    rows = zip(images, tokens, is_parallel, strict=True)
    want = [caption_logits(config, arrays, *row) for row in rows]
    found = logits(params, images, tokens, is_parallel)
    np.testing.assert_allclose(found, np.array(want), rtol=2e-5, atol=2e-5)
