"""Numbers beside numbers: what a conversion prints, and where it stops."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capjax.dims import Params
from capjax.errors import UserError
from capjax.interop.mapping import Weights, flatten
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.image_tower import ImageTower
from capjax.models.two_towers import TwoTowers, TwoTowersConfig

TOLERANCE = 2e-5  # of activations in float32, against 1 + their size


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest |found - wanted| / (1 + |wanted|)."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if found.shape != wanted.shape:
        raise ValueError(f"shapes {found.shape} and {wanted.shape}")
    return float(np.max(np.abs(found - wanted) / (1 + np.abs(wanted)), initial=0))


def activations(
    weights: Weights, images_BHWC: np.ndarray, tokens_BL: np.ndarray
) -> dict[str, np.ndarray]:
    """What our model computes in float32, by name, of normalised images and of labels."""
    config = dataclasses.replace(weights.config, dtype="float32")
    with jax.default_matmul_precision("highest"):
        found = _activations(config, weights.params, images_BHWC, tokens_BL)
    return jax.device_get(found)


@functools.partial(jax.jit, static_argnums=0)
def _activations(config, params, images_BHWC, tokens_BL):
    match config:
        case CaptionerConfig():
            model = Captioner(config)
            memory_BPD = model.encode(params, images_BHWC)
            found = {"image encoder": memory_BPD}
            for name, inputs_BL in decoder_inputs(config, tokens_BL).items():
                is_parallel_B = jnp.full(len(tokens_BL), name == "parallel")
                hidden_BLE = model.hidden(params, inputs_BL, memory_BPD, is_parallel_B)
                logits_BLV = model.logits(params, hidden_BLE)[..., : config.vocab_size]
                found[f"{name} logits"] = logits_BLV
        case TwoTowersConfig():
            model = TwoTowers(config)
            memory_BPD = model.encode(params, images_BHWC)
            image_BD = model.embed_image(params, memory_BPD)
            text_TD = model.embed_text(params, tokens_BL)
            scale, bias = model.logit_scale_and_bias(params)
            found = {
                "image encoder": memory_BPD,
                "feature": model.pooled(params, memory_BPD),
                "image embedding": image_BD,
                "text embedding": text_TD,
                "logits": scale * (image_BD @ text_TD.T) + bias,
            }
        case _:
            model = ImageTower(config)
            memory_BPD = model.encode(params, images_BHWC)
            found = {"image encoder": memory_BPD, "feature": model.pooled(params, memory_BPD)}
    return found


def decoder_inputs(config: CaptionerConfig, labels_BL: Any) -> dict[str, Any]:
    """A captioner's inputs by mode: the labels shifted right, the mask token everywhere."""
    inputs = {"causal": jnp.pad(labels_BL, ((0, 0), (1, 0)))[:, :-1]}
    if config.mask_token:
        inputs["parallel"] = jnp.full_like(labels_BL, config.vocab_size)
    return inputs


def activation_lines(
    found: Mapping[str, np.ndarray],
    wanted: Mapping[str, np.ndarray],
    against: str,
    tolerance: float = TOLERANCE,
) -> list[str]:
    """A line for each activation that ours (`found`) and another program (`wanted`) computed.

    Raises `UserError` where one differs by more than `tolerance`, or is no number.
    """
    lines = []
    for name, x in wanted.items():
        worst = difference(found[name], x)
        if not worst <= tolerance:
            raise UserError(
                f"{name} differs by {worst:.1e} from {against} (at most {tolerance:.0e} expected): "
                "the file is of another architecture than its names and shapes say"
            )
        shape = "x".join(map(str, x.shape))
        lines.append(f"{name} [{shape}]: max difference {worst:.1e} from {against}")
    return lines


def round_trip_line(written: Params, read: Params) -> str:
    """Whether parameters that were written are what is read back. Raises `UserError` if not."""
    written, read = flatten(written), flatten(read)
    if written.keys() != read.keys():
        names = ", ".join(sorted(written.keys() ^ read.keys()))
        raise UserError(f"what was written does not read back: {names} only on one side")
    worst = {name: difference(read[name], x) for name, x in written.items()}
    name = max(worst, key=worst.__getitem__)
    if worst[name] > 0:
        raise UserError(f"what was written does not read back: {name} differs by {worst[name]:.1e}")
    count = sum(x.size for x in jax.tree.leaves(written))
    return f"written and read back: {len(written)} arrays, {count:,} numbers, all equal"


def sample_inputs(
    image_size: int, text_length: int = 0, vocab_size: int = 0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Two random images (2, H, W, 3) in [-1, 1] and two rows of tokens (2, L), none of them pad."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, (2, image_size, image_size, 3)).astype(np.float32)
    tokens = rng.integers(min(1, vocab_size - 1), max(vocab_size, 1), (2, text_length), np.int32)
    return images, tokens
