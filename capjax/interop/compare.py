"""Numbers beside numbers: what a conversion prints, and where it stops."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capjax.errors import UserError
from capjax.interop.mapping import Weights, flatten
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.image_tower import ImageTower
from capjax.models.two_towers import TwoTowers, TwoTowersConfig

TOLERANCE = 2e-5  # of activations in float32, as `difference` measures them


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest |found - wanted| / (1 + |wanted| + its root mean square).

    The last term, because what is left of a sum of large numbers is as exact as those are.
    """
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if found.shape != wanted.shape:
        raise ValueError(f"shapes {found.shape} and {wanted.shape}")
    size = 1 + np.abs(wanted) + np.sqrt(np.mean(np.square(wanted)))
    return float(np.max(np.abs(found - wanted) / size))


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
    mend: str = "the file may be of another architecture than its names and shapes say",
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
                f"{mend}"
            )
        shape = "x".join(map(str, x.shape))
        lines.append(f"{name} [{shape}]: max difference {worst:.1e} from {against}")
    return lines


def round_trip_lines(written: Weights, read: Weights) -> list[str]:
    """Whether what was written is what is read back; where its form differs, what both compute.

    Raises `UserError` where that differs too.
    """
    before, after = flatten(written.params), flatten(read.params)
    if before.keys() != after.keys():
        names = ", ".join(sorted(before.keys() ^ after.keys()))
        raise UserError(f"what was written does not read back: {names} only on one side")
    other = sorted(name for name, x in before.items() if not np.array_equal(x, after[name]))
    numbers = sum(x.size for x in before.values())
    line = f"written and read back: {len(before)} arrays, {numbers:,} numbers, "
    if not other:
        return [f"{line}all equal"]
    inputs = inputs_for(written.config)
    found, wanted = activations(read, *inputs), activations(written, *inputs)
    return [
        f"{line}all equal but for the form of {', '.join(other)}",
        *activation_lines(
            found, wanted, "before it was written", mend="that format cannot hold this model"
        ),
    ]


def sample_inputs(
    image_size: int, text_length: int = 0, vocab_size: int = 0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Two random images (2, H, W, 3) in [-1, 1] and two rows of tokens (2, L), none of them pad."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, (2, image_size, image_size, 3)).astype(np.float32)
    tokens = rng.integers(min(1, vocab_size - 1), max(vocab_size, 1), (2, text_length), np.int32)
    return images, tokens


def inputs_for(config: ImageEncoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """`sample_inputs` of a configuration's sizes."""
    return sample_inputs(
        config.image_size, getattr(config, "text_length", 0), getattr(config, "vocab_size", 0)
    )
