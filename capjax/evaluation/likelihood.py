"""How well a captioner predicts held-out captions, token by token, and whether it looks."""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from capjax.data.tokenizer import PAD_ID
from capjax.dims import Batch, Params
from capjax.errors import UserError
from capjax.mesh import place_batch
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa
from capjax.objectives.captioning import caption_means, decoder_inputs, token_nll
from capjax.objectives.metrics import Mean, masked_mean


def evaluate_likelihood(
    model: Captioner | CoCa, params: Params, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh
) -> dict[str, float]:
    """Losses in nats over every row of `batches` whose `mask` holds and that has a caption.

    Args:
      batches: this process's rows of each global batch: `image`, `tokens`, `mask`.
      mesh: what the parameters lie on.

    Returns:
      loss: mean over all tokens; perplexity: its exponential.
      caption_loss: mean over captions of their mean over tokens (what training minimises).
      caption_nats: mean over captions of their sum over tokens.
      parallel_loss, ...: the same four in parallel mode, where the model has a mask token.
      shuffled_images_loss: `loss`, each caption given the image of another row of its batch. A
        model that ignores the image has it equal to `loss`. It alone depends on the batches.

    Raises `UserError` where there is no captioned row at all.
    """
    read, late = [], None
    with jax.set_mesh(mesh):
        for batch in batches:
            sums = _batch_sums(model, params, place_batch(mesh, _prepare(batch)))
            if late is not None:  # one batch late: bounds what is queued, keeps the device busy
                read.append(jax.device_get(late))
            late = sums
    read += [] if late is None else [jax.device_get(late)]
    if not any(sums["loss"].count for sums in read):
        raise UserError("evaluation: expected captioned examples, found none; check the split")
    means = {name: _mean([sums[name] for sums in read]) for name in read[0]}
    for prefix in ("", "parallel_") if model.config.mask_token else ("",):
        means[f"{prefix}perplexity"] = _exp(means[f"{prefix}loss"])
    return means


def _mean(parts: list[Mean]) -> float:
    """In float64, so that the size of the batches does not show. 0 where nothing was counted."""
    return math.fsum(part.total for part in parts) / max(math.fsum(p.count for p in parts), 1.0)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _prepare(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows to place. Without tokens a row counts nowhere, as those without caption shall."""
    tokens_BL = batch["tokens"]
    is_caption_B = batch["mask"] & ((tokens_BL != PAD_ID).sum(1) > 1)  # an end alone is none
    tokens_BL = np.where(is_caption_B[:, None], tokens_BL, PAD_ID)
    # Of the whole batch, so that it does not show how many processes share it.
    all_BL = multihost_utils.process_allgather(tokens_BL, tiled=True)
    rows = np.flatnonzero((all_BL != PAD_ID).any(1))
    others_BL = np.full_like(all_BL, PAD_ID)
    if len(rows) > 1:  # a random cycle through the rows: none meets its own image
        cycle = np.random.default_rng(0).permutation(rows)
        others_BL[cycle] = all_BL[np.roll(cycle, 1)]
    first = jax.process_index() * len(tokens_BL)
    own_BL = others_BL[first : first + len(tokens_BL)]
    return {"image": batch["image"], "tokens": tokens_BL, "others": own_BL}


@functools.partial(jax.jit, static_argnums=0)
def _batch_sums(model: Captioner | CoCa, params: Params, batch: Batch) -> dict[str, Mean]:
    patches_BPD = model.encode(params, batch["image"])

    def nll(labels_BL, is_parallel_B):
        inputs_BL = decoder_inputs(labels_BL, is_parallel_B, model.mask_id)
        hidden_BLE = model.hidden(params, inputs_BL, patches_BPD, is_parallel_B)
        kernel_EV, bias_V = model.output_head(params)
        vocab_size = model.config.vocab_size
        return token_nll(hidden_BLE, kernel_EV, bias_V, labels_BL, vocab_size=vocab_size)

    labels_BL = batch["tokens"]
    sums = _sums("", nll(labels_BL, None), labels_BL)
    if model.config.mask_token:
        everywhere_B = jnp.ones_like(labels_BL[:, 0], bool)
        sums |= _sums("parallel_", nll(labels_BL, everywhere_B), labels_BL)
    others_BL = batch["others"]
    shuffled = masked_mean(nll(others_BL, None), others_BL != PAD_ID)
    return sums | {"shuffled_images_loss": shuffled}


def _sums(prefix: str, nll_BL, labels_BL) -> dict[str, Mean]:
    is_token_BL = labels_BL != PAD_ID
    is_caption_B = is_token_BL.any(1)
    return {
        f"{prefix}loss": masked_mean(nll_BL, is_token_BL),
        f"{prefix}caption_loss": masked_mean(caption_means(nll_BL, labels_BL), is_caption_B),
        f"{prefix}caption_nats": masked_mean(nll_BL.sum(1), is_caption_B),
    }
