"""The weighted sum of a run's objectives over shared towers, the images encoded once."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from capjax.dims import Array, Int, Metrics, Params
from capjax.errors import UserError
from capjax.mesh import act_BL, act_BLD, out_sharding
from capjax.models.towers import Towers
from capjax.models.two_towers import TwoTowers
from capjax.objectives.captioning import (
    CaptioningObjective,
    captioning_prepare,
    captioning_rows,
)
from capjax.objectives.coca import CoCaObjective, coca_prepare, coca_rows
from capjax.objectives.contrastive import (
    ContrastiveObjective,
    clamped,
    contrastive_loss,
    softmax_loss,
)
from capjax.objectives.objective import Loss


@dataclasses.dataclass(frozen=True)
class Objectives:
    """What a run minimises: the sum of these, each times its `weight`."""

    captioning: CaptioningObjective = dataclasses.field(default_factory=CaptioningObjective)
    contrastive: ContrastiveObjective = dataclasses.field(default_factory=ContrastiveObjective)
    coca: CoCaObjective = dataclasses.field(default_factory=CoCaObjective)

    def models_needed(self) -> tuple[str, ...]:
        """Kinds of `capjax.models.towers` behind the objectives of weight above 0."""
        weights = {
            "captioner": self.captioning.weight,
            "two_towers": self.contrastive.weight,
            "coca": self.coca.weight,
        }
        needed = tuple(kind for kind, weight in weights.items() if weight > 0)
        if not needed or ("coca" in needed and len(needed) > 1):
            raise UserError(
                f"objective weights captioning={self.captioning.weight}, "
                f"contrastive={self.contrastive.weight}, coca={self.coca.weight}: expected coca "
                "alone, or any sum of the others with a weight above 0"
            )
        return needed

    def rows_together(self, captions_per_image: int = 1) -> int:
        """So many consecutive images must share a microbatch and a device."""
        return self.captioning.rows_together(captions_per_image) if self.captioning.weight else 1


def combined_loss(towers: Towers, objectives: Objectives, captions_per_image: int = 1) -> Loss:
    """The loss of a step over batches of `image`, `tokens` and `position`.

    The images are encoded once. `tokens` are [B, L], or [B, K, L] for K captions an image.
    """
    captioning, contrastive, coca = (
        objectives.captioning,
        objectives.contrastive,
        objectives.coca,
    )
    embedder: Any = towers.embedder
    captioning_fields, coca_fields = _fields(captioning), _fields(coca)

    def rows(params: Params, batch, key):
        memory_BSD = towers.encode(params, batch["image"])
        loss, metrics, embeddings = jnp.zeros(()), {}, ()
        if towers.captioner is not None:
            value, metrics = captioning_rows(
                towers.captioner, params, memory_BSD, batch, key, **captioning_fields
            )
            loss += captioning.weight * value
        if towers.two_towers is not None:
            embeddings = embed_pairs(towers.two_towers, params, memory_BSD, batch["tokens"])
        if towers.coca is not None:
            value, metrics, embeddings = coca_rows(
                towers.coca, params, memory_BSD, batch, key, **coca_fields
            )
            loss += coca.weight * value
        return loss, metrics, embeddings

    def across(params: Params, embeddings):
        scale, bias = embedder.logit_scale_and_bias(params)
        if towers.coca is not None:
            if coca.max_logit_scale:
                scale = clamped(scale, coca.max_logit_scale)
            loss, metrics = softmax_loss(
                embeddings["image"], embeddings["text"], scale, chunked=coca.chunked
            )
            return coca.weight * coca.contrastive_weight * loss, _named(metrics, loss)
        loss, metrics = contrastive_loss(
            contrastive, embeddings["image"], embeddings["text"], scale, bias
        )
        return contrastive.weight * loss, _named(metrics, loss)

    def prepare(batch, key):
        if towers.captioner is not None:
            batch = captioning_prepare(batch, key, **captioning_fields)
        if towers.coca is not None:
            batch = coca_prepare(batch, key, **coca_fields)
        return batch

    return Loss(
        rows,
        across if towers.embedder is not None else None,
        prepare,
        rows_together=objectives.rows_together(captions_per_image),
    )


def embed_pairs(
    towers: TwoTowers, params: Params, memory_BSD: Array, tokens: Int[Array, "B *K L"]
) -> dict[str, Array]:
    """{"image": [B, D], "text": [B, K, D]}, float32 of length 1."""
    tokens_BKL = tokens if tokens.ndim == 3 else tokens[:, None]
    B, K, L = tokens_BKL.shape
    tokens_TL = tokens_BKL.reshape((B * K, L), out_sharding=out_sharding(act_BL))
    text_TD = towers.embed_text(params, tokens_TL)
    text_BKD = text_TD.reshape((B, K, text_TD.shape[-1]), out_sharding=out_sharding(act_BLD))
    return {"image": towers.embed_image(params, memory_BSD), "text": text_BKD}


def _named(metrics: Metrics, loss: Array) -> Metrics:
    return {f"contrastive_{name}": value for name, value in metrics.items()} | {
        "contrastive_loss": loss
    }


def _fields(objective) -> dict:
    fields = dataclasses.asdict(objective)
    del fields["weight"]
    return fields
