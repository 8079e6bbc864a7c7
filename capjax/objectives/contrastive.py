"""Contrastive losses of a batch of images and their captions: sigmoid (SigLIP), softmax (CLIP).

An image may have several captions, all of them its positives; every other caption of the global
batch is a negative of it. Each loss comes in two forms of equal value and gradients: the full one
holds all logits at once, split by images over the mesh; the chunked one only tiles of them.

Sources: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023); Radford et al.,
"Learning Transferable Visual Models From Natural Language Supervision" (2021); for several
positives Khosla et al., "Supervised Contrastive Learning" (2020), its L_out: the mean over the
positives of their log-probabilities; so too Yang et al., "Unified Contrastive Learning in
Image-Text-Label Space" (2022).

Letters: B images (global), K captions an image, C the images again where their captions are meant.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from capjax.dims import Array, Float, Metrics
from capjax.errors import UserError
from capjax.mesh import BATCH, act_BD, reshard
from capjax.objectives.contrastive_chunked import Best, Normalizers, normalizers, sigmoid_total

# Rows and columns of a tile: products large enough to be fast, 4 MB of float32 a tile.
TILE = 1024


@dataclasses.dataclass(frozen=True)
class ContrastiveObjective:
    """Images and their captions, against all other captions and images of the global batch.

    Attributes:
      weight: of this loss in the sum; 0 leaves it out.
      kind: "sigmoid" (SigLIP, Zhai et al. 2023) or "softmax" (CLIP, Radford et al. 2021).
      chunked: never holds the matrix of all pairs; the same value and gradient.
      chunk_size: rows of a chunk; 0 chooses.
      label_smoothing: of the softmax.
      max_logit_scale: the factor on the cosines is held below this; 0 does not hold it. CLIP: 100.
    """

    weight: float = 0.0
    kind: str = "sigmoid"
    chunked: bool = True
    chunk_size: int = 0
    label_smoothing: float = 0.0
    max_logit_scale: float = 0.0

    def __post_init__(self):
        if self.kind not in ("sigmoid", "softmax"):
            raise UserError(f"objective.contrastive.kind={self.kind!r}: choose sigmoid or softmax")
        for name in ("weight", "chunk_size", "max_logit_scale"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"objective.contrastive.{name}={value}: expected 0 or more")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"objective.contrastive.label_smoothing={self.label_smoothing}: expected 0 to less "
                "than 1"
            )
        if self.label_smoothing and self.kind == "sigmoid":
            raise UserError(
                "objective.contrastive.label_smoothing is of the softmax: set it to 0, or "
                "objective.contrastive.kind=softmax"
            )


def contrastive_loss(
    objective: ContrastiveObjective,
    image_BD: Float[Array, "B D"],
    text_BKD: Float[Array, "B K D"],
    scale: Float[Array, ""],
    bias: Float[Array, ""] | float,
) -> tuple[Float[Array, ""], Metrics]:
    """(loss, metrics) as the objective says, its weight left to the caller."""
    if objective.max_logit_scale:
        scale = clamped(scale, objective.max_logit_scale)
    chunks: dict = {"chunked": objective.chunked, "chunk_size": objective.chunk_size}
    if objective.kind == "sigmoid":
        return sigmoid_loss(image_BD, text_BKD, scale, bias, **chunks)
    smoothing = objective.label_smoothing
    return softmax_loss(image_BD, text_BKD, scale, label_smoothing=smoothing, **chunks)


def sigmoid_loss(
    image_BD: Float[Array, "B D"],
    text_BKD: Float[Array, "B K D"],
    scale: Float[Array, ""],
    bias: Float[Array, ""] | float,
    *,
    chunked: bool = True,
    chunk_size: int = 0,
) -> tuple[Float[Array, ""], Metrics]:
    """(SigLIP's loss in nats, metrics) of unit-norm embeddings; logits are scale * cosine + bias.

    The sum over all pairs of -log sigmoid(logit), the logit negated where the caption is not the
    image's, divided by the B * K captions: for K = 1 SigLIP's sum over captions, mean over images.

    Args:
      chunked: hold tiles of at most `chunk_size` images by `chunk_size` captions (0: a size that
        suits most devices), never all the logits; differentiable once. The gradients are formed
        while a tile is at hand: three matrix products in all, as in the full form.

    Products run in the type of the embeddings and sum in float32. Metrics, without gradients:
    `image_to_text_accuracy`, how often the best caption is one of the image's, and
    `text_to_image_accuracy`, both within the batch, a tie being a miss; `positive_logit` and
    `negative_logit`, means over the pairs; `scale`.

    Raises `UserError` where `chunk_size` is negative.
    """
    scale, bias = jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
    size = _tile_size(chunk_size)
    if chunked:
        total, best = sigmoid_total(size, image_BD, text_BKD, scale, bias)
    else:
        logits_BCK = _all_logits(image_BD, text_BKD) * scale + bias
        is_positive_BCK = _positives(logits_BCK)
        total = jnp.sum(jax.nn.softplus(jnp.where(is_positive_BCK, -logits_BCK, logits_BCK)))
        best = _best(logits_BCK, is_positive_BCK)
    num_texts = text_BKD.shape[0] * text_BKD.shape[1]
    return total / num_texts, _metrics(image_BD, text_BKD, scale, bias, best)


def softmax_loss(
    image_BD: Float[Array, "B D"],
    text_BKD: Float[Array, "B K D"],
    scale: Float[Array, ""],
    *,
    label_smoothing: float = 0.0,
    chunked: bool = True,
    chunk_size: int = 0,
) -> tuple[Float[Array, ""], Metrics]:
    """(CLIP's loss in nats, metrics) of unit-norm embeddings; logits are scale * cosine.

    The mean of two cross entropies. Image to text: over all B * K captions of the batch, the target
    1 / K on each of the image's own, mean over images. Text to image: over the B images, the target
    the caption's image, mean over captions. With label smoothing s the targets keep 1 - s, and s
    goes in equal parts to all that are not positives (as in `capjax.objectives.cross_entropy`).

    Arguments, metrics and errors as in `sigmoid_loss`. The chunked form walks over the logits
    twice, once for their normalisers and once for the gradients: four matrix products in all.
    """
    scale = jnp.asarray(scale, jnp.float32)
    size = _tile_size(chunk_size)
    if chunked:
        found = normalizers(size, image_BD, text_BKD, scale)
    else:
        logits_BCK = _all_logits(image_BD, text_BKD) * scale
        found = Normalizers(
            jax.nn.logsumexp(logits_BCK, (1, 2)),
            reshard(jax.nn.logsumexp(logits_BCK, 0), act_BD),
            _best(logits_BCK, _positives(logits_BCK)),
        )
    logsumexp_B, logsumexp_BK, best = found
    B, K = best.own_BK.shape
    own_B = best.own_BK.mean(1)
    loss_B, loss_BK = logsumexp_B - own_B, logsumexp_BK - best.own_BK
    if label_smoothing and B > 1:
        image_BD, text_BKD = image_BD.astype(jnp.float32), text_BKD.astype(jnp.float32)
        all_B = scale * jnp.sum(image_BD * jnp.sum(text_BKD, (0, 1))[None, :], 1)
        all_BK = scale * jnp.sum(text_BKD * jnp.sum(image_BD, 0)[None, None, :], 2)
        others_B = (all_B - K * own_B) / (B * K - K)
        others_BK = (all_BK - best.own_BK) / (B - 1)
        loss_B += label_smoothing * (own_B - others_B)
        loss_BK += label_smoothing * (best.own_BK - others_BK)
    loss = (jnp.mean(loss_B) + jnp.mean(loss_BK)) / 2
    return loss, _metrics(image_BD, text_BKD, scale, jnp.zeros(()), best)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clamped(scale: Float[Array, ""], largest: float) -> Float[Array, ""]:
    """`scale`, at most `largest`; beyond it the gradient still passes where it asks for less.

    CLIP clips the parameter after each step to the same end: the scale never acts above the limit,
    and is not stuck there. A plain minimum would have no gradient that leads back.
    """
    return jnp.minimum(scale, largest)


def _clamped_forward(scale, largest):
    return clamped(scale, largest), scale < largest


def _clamped_backward(largest, is_below, cotangent):
    return (jnp.where(is_below | (cotangent > 0), cotangent, 0),)


clamped.defvjp(_clamped_forward, _clamped_backward)


def _tile_size(chunk_size: int) -> int:
    if chunk_size < 0:
        raise UserError(
            f"objective.contrastive.chunk_size={chunk_size}: expected rows, or 0 for a default"
        )
    return chunk_size or TILE


def _all_logits(image_BD, text_BKD):
    """Cosines, (B, C, K), split by images."""
    text_CKD = reshard(text_BKD, P(None, None, None))
    return jnp.einsum("bd,ckd->bck", image_BD, text_CKD, preferred_element_type=jnp.float32)


def _positives(logits_BCK):
    B = logits_BCK.shape[0]
    is_positive_BC1 = jnp.arange(B)[:, None, None] == jnp.arange(B)[None, :, None]
    return reshard(jnp.broadcast_to(is_positive_BC1, logits_BCK.shape), P(BATCH, None, None))


def _best(logits_BCK, is_positive_BCK) -> Best:
    negative_BCK = jax.lax.stop_gradient(jnp.where(is_positive_BCK, -jnp.inf, logits_BCK))
    return Best(
        jnp.sum(jnp.where(is_positive_BCK, logits_BCK, 0), 1),
        jnp.max(negative_BCK, (1, 2)),
        reshard(jnp.max(negative_BCK, 0), act_BD),
    )


def _metrics(image_BD, text_BKD, scale, bias, best: Best) -> Metrics:
    image_BD, text_BKD, scale, bias, best = jax.lax.stop_gradient(
        (image_BD, text_BKD, scale, bias, best)
    )
    B, K = best.own_BK.shape
    image_D = jnp.sum(image_BD, 0, dtype=jnp.float32)
    text_D = jnp.sum(text_BKD, (0, 1), dtype=jnp.float32)
    everything = scale * jnp.vdot(image_D, text_D) + bias * float(B * B * K)
    return {
        "image_to_text_accuracy": jnp.mean(best.own_BK.max(1) > best.negative_B),
        "text_to_image_accuracy": jnp.mean(best.own_BK > best.negative_BK),
        "positive_logit": jnp.mean(best.own_BK),
        "negative_logit": (everything - jnp.sum(best.own_BK)) / float(max((B - 1) * B * K, 1)),
        "scale": scale,
    }
