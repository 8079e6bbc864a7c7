"""big_vision's models in NumPy and float64, from the published equations and under its names.

A second implementation, to compare ours with where big_vision itself is not installed. One example
at a time; arrays by name in loop layout, as `npz.read_npz` gives them.
"""

import math
from collections.abc import Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]


def reference_activations(
    arrays: Arrays, model: str, images_BHWC: np.ndarray, tokens_BL: np.ndarray
) -> dict[str, np.ndarray]:
    """What `compare.activations` computes of the same images and labels, by the same names."""
    tower = {"captioner": "encoder/", "two_towers": "img/", "image_encoder": ""}[model]
    encoded = [encode_image(arrays, image, tower) for image in images_BHWC]
    found = {"image encoder": encoded}
    if model != "captioner":
        found["feature"] = [pool_image(arrays, x, tower) for x in encoded]
    if model == "two_towers":
        found["image embedding"] = [embed_image(arrays, x, tower) for x in found["feature"]]
        found["text embedding"] = [embed_text(arrays, tokens) for tokens in tokens_BL]
    if model == "captioner":
        found |= _caption_activations(arrays, encoded, tokens_BL)
    return {name: np.array(rows) for name, rows in found.items()}


def _caption_activations(
    arrays: Arrays, encoded: list[np.ndarray], tokens_BL: np.ndarray
) -> dict[str, list[np.ndarray]]:
    vocab_size, length = len(arrays["decoder/LogitsDense/bias"]), tokens_BL.shape[1]
    inputs = {"causal": np.pad(tokens_BL, ((0, 0), (1, 0)))[:, :-1]}
    if len(arrays["decoder/EmbedTargets/embedding"]) > vocab_size:
        inputs["parallel"] = np.full_like(tokens_BL, vocab_size)
    return {
        f"{name} logits": [
            caption_logits(arrays, x, tokens, length, name == "parallel")
            for x, tokens in zip(encoded, inputs_BL, strict=True)
        ]
        for name, inputs_BL in inputs.items()
    }


class _Parameters:
    """The arrays below a prefix, as float64 when asked for; a bias that there is not is 0."""

    def __init__(self, arrays: Arrays, prefix: str = ""):
        self._arrays = arrays
        self._prefix = prefix

    def below(self, name: str) -> "_Parameters":
        return _Parameters(self._arrays, f"{self._prefix}{name}/")

    def has(self, name: str) -> bool:
        return any(key.startswith(self._prefix + name) for key in self._arrays)

    def __getitem__(self, name: str) -> np.ndarray:
        found = self._arrays.get(self._prefix + name)
        if found is None and name.endswith("bias"):
            return np.zeros(())
        if found is None:
            raise KeyError(self._prefix + name)
        return found.astype(np.float64)


def encode_image(arrays: Arrays, image_HWC: np.ndarray, tower: str = "") -> np.ndarray:
    """(P, D): the patches of a float image in [-1, 1] after the final LayerNorm.

    `tower` is where the encoder lies: "img/", "encoder/" or "". Its class token, if there is one,
    is the last row.
    """
    p = _Parameters(arrays, tower)
    kernel = p["embedding/kernel"]
    size, width = kernel.shape[0], kernel.shape[-1]
    rows, columns = (n // size for n in image_HWC.shape[:2])
    patches = [
        image_HWC[size * i : size * (i + 1), size * j : size * (j + 1)].ravel()
        for i in range(rows)
        for j in range(columns)
    ]
    x = np.array(patches, np.float64) @ kernel.reshape(-1, width) + p["embedding/bias"]
    x = x + (p["pos_embedding"][0] if p.has("pos_embedding") else fixed(rows, columns, width))
    if p.has("cls"):
        x = np.concatenate([x, p["cls"][0]])
    return transformer(p.below("Transformer"), x)


def pool_image(arrays: Arrays, encoded_PD: np.ndarray, tower: str = "") -> np.ndarray:
    """(D,): the pooling head's result, or the class token, or the mean."""
    p = _Parameters(arrays, tower)
    if p.has("MAPHead_0/"):
        head = p.below("MAPHead_0")
        x = attention(head["probe"][0], encoded_PD, head.below("MultiHeadDotProductAttention_0"))
        x = x + mlp(layer_norm(x, head.below("LayerNorm_0")), head.below("MlpBlock_0"))
        return x[0]
    return encoded_PD[-1] if p.has("cls") else encoded_PD.mean(0)


def embed_image(arrays: Arrays, feature_D: np.ndarray, tower: str = "img/") -> np.ndarray:
    """(E,), of length 1: what two towers make of the pooled image."""
    p = _Parameters(arrays, tower)
    x = feature_D @ p["head/kernel"] + p["head/bias"] if p.has("head/") else feature_D
    return unit(x)


def embed_text(arrays: Arrays, tokens_L: np.ndarray, tower: str = "txt/") -> np.ndarray:
    """(D,), of length 1: the text of two towers, read off its last token."""
    p = _Parameters(arrays, tower)
    x = p["Embed_0/embedding"][tokens_L] + p["pos_embedding"][0]
    x = transformer(p.below("Encoder_0"), x)
    return unit(x[-1] @ p["head/kernel"] + p["head/bias"])


def caption_logits(
    arrays: Arrays, encoded_PD: np.ndarray, tokens_L: np.ndarray, text_length: int, parallel: bool
) -> np.ndarray:
    """(L, V): CapPa's logits, given its decoder's inputs."""
    p = _Parameters(arrays)
    length, width = len(tokens_L), arrays["decoder/EmbedTargets/embedding"].shape[1]
    learned = p.has("pos_embedding_decoder")
    places = p["pos_embedding_decoder"][0] if learned else fixed(1, text_length, width)
    # Of a vocabulary of any size only the rows in use are made float64.
    x = arrays["decoder/EmbedTargets/embedding"][tokens_L].astype(np.float64) + places[:length]
    visible = np.ones((length, length), bool) if parallel else np.tri(length, dtype=bool)
    for block in _blocks(p.below("decoder"), "EncDecBlock"):
        y = layer_norm(x, block.below("LayerNorm1"))
        x = x + attention(y, y, block.below("SelfAttn"), visible)
        y = layer_norm(x, block.below("LayerNorm2"))
        x = x + attention(y, encoded_PD, block.below("CrossAttn"))
        x = x + mlp(layer_norm(x, block.below("LayerNorm3")), block.below("MLP"))
    x = layer_norm(x, p.below("decoder/LayerNorm"))
    return x @ p["decoder/LogitsDense/kernel"] + p["decoder/LogitsDense/bias"]


def transformer(p: _Parameters, x: np.ndarray) -> np.ndarray:
    """Pre-norm blocks and the final LayerNorm."""
    for block in _blocks(p, "encoderblock_"):
        y = layer_norm(x, block.below("LayerNorm_0"))
        x = x + attention(y, y, block.below("MultiHeadDotProductAttention_0"))
        x = x + mlp(layer_norm(x, block.below("LayerNorm_1")), block.below("MlpBlock_0"))
    return layer_norm(x, p.below("encoder_norm"))


def _blocks(p: _Parameters, name: str):
    number = 0
    while p.has(f"{name}{number}/"):
        yield p.below(f"{name}{number}")
        number += 1


def layer_norm(x: np.ndarray, p: _Parameters) -> np.ndarray:
    """Over the last axis; eps 1e-6."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def attention(
    x: np.ndarray, memory: np.ndarray, p: _Parameters, visible: np.ndarray | None = None
) -> np.ndarray:
    """Multi-head attention of x (L, E) to memory (S, D)."""

    def heads(x: np.ndarray, part: str) -> np.ndarray:
        kernel = p[f"{part}/kernel"]
        flat = x @ kernel.reshape(len(kernel), -1)
        return flat.reshape(len(x), *kernel.shape[1:]) + p[f"{part}/bias"]

    query, key, value = heads(x, "query"), heads(memory, "key"), heads(memory, "value")
    logits = np.einsum("qhk,shk->hqs", query, key, optimize=True) / math.sqrt(query.shape[-1])
    if visible is not None:
        logits = np.where(visible, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqs,shk->qhk", weights, value, optimize=True).reshape(len(x), -1)
    kernel = p["out/kernel"]
    return mixed @ kernel.reshape(-1, kernel.shape[-1]) + p["out/bias"]


def mlp(x: np.ndarray, p: _Parameters) -> np.ndarray:
    """Two projections with a GELU (tanh approximation) between."""
    x = x @ p["Dense_0/kernel"] + p["Dense_0/bias"]
    x = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x @ p["Dense_1/kernel"] + p["Dense_1/bias"]


def fixed(rows: int, columns: int, width: int) -> np.ndarray:
    """Sine and cosine positions of a grid, row by row: (rows * columns, width)."""
    frequencies = [1e4 ** (-i / (width // 4 - 1)) for i in range(width // 4)]
    return np.array(
        [
            [f(x * w) for x in (column, row) for f in (math.sin, math.cos) for w in frequencies]
            for row in range(rows)
            for column in range(columns)
        ]
    )


def unit(x: np.ndarray) -> np.ndarray:
    """`x` over its length, as two towers return it."""
    return x / (np.linalg.norm(x) + 1e-8)
