"""The sums over all pairs that the chunked contrastive losses need, and their gradients.

Letters: B images, K captions an image, D width; T = B * K captions in one row, R images and C
captions of a tile. Inside `per_device` B and T are those of one device.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from capjax.dims import Array
from capjax.objectives.tiles import Pairs, Start, per_device, walk


class Best(NamedTuple):
    """What the metrics need of the logits."""

    own_BK: Array  # each caption with its image
    negative_B: Array  # the largest logit of each image with a caption of another
    negative_BK: Array  # the largest logit of each caption with another image


class Normalizers(NamedTuple):
    logsumexp_B: Array  # over all captions
    logsumexp_BK: Array  # over all images
    best: Best


def _tile_best(logits_RC, pairs: Pairs, negative_R, own_C, negative_C):
    """What `Best` holds, of one more tile."""
    negative_RC = logits_RC
    if pairs.is_positive_RC is not None:
        negative_RC = jnp.where(pairs.is_positive_RC, -jnp.inf, logits_RC)
        own_RC = jnp.where(pairs.is_positive_RC, logits_RC, -jnp.inf)
        own_C = jnp.maximum(own_C, own_RC.max(0))
    negative_R = jnp.maximum(negative_R, negative_RC.max(1))
    return negative_R, own_C, jnp.maximum(negative_C, negative_RC.max(0))


def _negated(x_RC, pairs: Pairs):
    """`x_RC`, negated at the positives."""
    if pairs.is_positive_RC is None:
        return x_RC
    return jnp.where(pairs.is_positive_RC, -x_RC, x_RC)


def _tile_logits(image_RD, text_CD, pairs: Pairs, scale, bias):
    """Logits, -inf where a pair was seen before."""
    logits_RC = _matmul(image_RD, text_CD.T) * scale + bias
    if pairs.is_new_RC is None:
        return logits_RC
    return jnp.where(pairs.is_new_RC, logits_RC, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sigmoid_total(size: int, image_BD, text_BKD, scale, bias):
    """(sum over all pairs of -log sigmoid(+-logit), `Best`); the second carries no gradient."""
    device = functools.partial(_sigmoid_device, size, False)
    loss_B, best = per_device(device, (image_BD, text_BKD), (scale, bias))
    return jnp.sum(loss_B), best


def _sigmoid_forward(size, image_BD, text_BKD, scale, bias):
    device = functools.partial(_sigmoid_device, size, True)
    loss_B, best, *gradients = per_device(device, (image_BD, text_BKD), (scale, bias))
    return (jnp.sum(loss_B), best), (image_BD, text_BKD, scale, *gradients)


def _sigmoid_backward(size, residuals, cotangents):
    image_BD, text_BKD, scale, slope_B, to_image_BD, to_text_BKD = residuals
    cotangent = cotangents[0]
    return (
        (cotangent * scale * to_image_BD).astype(image_BD.dtype),
        (cotangent * scale * to_text_BKD).astype(text_BKD.dtype),
        cotangent * jnp.sum(image_BD * to_image_BD),
        cotangent * jnp.sum(slope_B),
    )


sigmoid_total.defvjp(_sigmoid_forward, _sigmoid_backward)


def _sigmoid_device(size: int, with_gradients: bool, axes, image_BD, text_BKD, scale, bias):
    """(loss_B, best), then the derivative in the logits, summed: alone, times texts, images."""
    B, K, D = text_BKD.shape

    def tile(rows, columns, pairs: Pairs, of_rows, of_columns):
        (image_RD,), (text_CD,) = rows, columns
        loss_R, negative_R, *gradients_R = of_rows
        own_C, negative_C, *gradients_C = of_columns
        logits_RC = _tile_logits(image_RD, text_CD, pairs, scale, bias)
        best = _tile_best(logits_RC, pairs, negative_R, own_C, negative_C)
        signed_RC = _negated(logits_RC, pairs)
        small_RC = jnp.exp(-jnp.abs(signed_RC))
        loss_R += jnp.sum(jnp.maximum(signed_RC, 0) + jnp.log1p(small_RC), 1)
        if with_gradients:
            slope_R, to_image_RD = gradients_R
            (to_text_CD,) = gradients_C
            slope_RC = _negated(jnp.where(signed_RC >= 0, 1, small_RC) / (1 + small_RC), pairs)
            slope_R += slope_RC.sum(1)
            slope_RC = slope_RC.astype(text_CD.dtype)
            gradients_R = slope_R, to_image_RD + _matmul(slope_RC, text_CD)
            gradients_C = (to_text_CD + _matmul(slope_RC.T, image_RD),)
        return (loss_R, best[0], *gradients_R), (best[1], best[2], *gradients_C)

    of_rows = Start(0.0), Start(-jnp.inf)
    of_columns = Start(-jnp.inf), Start(-jnp.inf)
    if with_gradients:
        of_rows += Start(0.0), Start(0.0, (D,))
        of_columns += (Start(0.0, (D,)),)
    columns = (text_BKD.reshape(B * K, D),)
    of_rows, of_columns = walk(
        tile, (image_BD,), columns, of_rows, of_columns, per_image=K, size=size, axes=axes
    )
    loss_B, negative_B, *gradients_B = of_rows
    own_BK, negative_BK, *gradients_BK = (x.reshape(B, K, *x.shape[1:]) for x in of_columns)
    return loss_B, Best(own_BK, negative_B, negative_BK), *gradients_B, *gradients_BK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalizers(size: int, image_BD, text_BKD, scale) -> Normalizers:
    """`Normalizers`; of `best` only `own_BK` carries a gradient."""
    device = functools.partial(_normalizers_device, size)
    return per_device(device, (image_BD, text_BKD), (scale,))


def _normalizers_forward(size, image_BD, text_BKD, scale):
    found = normalizers(size, image_BD, text_BKD, scale)
    return found, (image_BD, text_BKD, scale, *found[:2])


def _normalizers_backward(size, residuals, cotangents: Normalizers):
    image_BD, text_BKD, scale, logsumexp_B, logsumexp_BK = residuals
    cotangent_B, cotangent_BK, best = cotangents
    rows = image_BD, logsumexp_B, cotangent_B, text_BKD, logsumexp_BK, cotangent_BK
    device = functools.partial(_normalizer_gradients_device, size)
    to_image_BD, to_text_BKD = per_device(device, rows, (scale,))
    own_BK1 = best.own_BK[..., None]
    to_image_BD += jnp.sum(own_BK1 * text_BKD, 1)
    to_text_BKD += own_BK1 * image_BD[:, None, :]
    return (
        (scale * to_image_BD).astype(image_BD.dtype),
        (scale * to_text_BKD).astype(text_BKD.dtype),
        jnp.sum(image_BD * to_image_BD),
    )


normalizers.defvjp(_normalizers_forward, _normalizers_backward)


def _normalizers_device(size: int, axes, image_BD, text_BKD, scale) -> Normalizers:
    B, K, D = text_BKD.shape

    def tile(rows, columns, pairs: Pairs, of_rows, of_columns):
        (image_RD,), (text_CD,) = rows, columns
        max_R, sum_R, negative_R = of_rows
        max_C, sum_C, own_C, negative_C = of_columns
        logits_RC = _tile_logits(image_RD, text_CD, pairs, scale, 0)
        negative_R, own_C, negative_C = _tile_best(logits_RC, pairs, negative_R, own_C, negative_C)
        of_rows = *_add_exponentials(max_R, sum_R, logits_RC, 1), negative_R
        of_columns = *_add_exponentials(max_C, sum_C, logits_RC, 0), own_C, negative_C
        return of_rows, of_columns

    lowest = Start(float(jnp.finfo(jnp.float32).min))  # finite: what has no logits sums to 0
    of_rows = lowest, Start(0.0), Start(-jnp.inf)
    of_columns = lowest, Start(0.0), Start(-jnp.inf), Start(-jnp.inf)
    columns = (text_BKD.reshape(B * K, D),)
    of_rows, of_columns = walk(
        tile, (image_BD,), columns, of_rows, of_columns, per_image=K, size=size, axes=axes
    )
    max_B, sum_B, negative_B = of_rows
    max_BK, sum_BK, own_BK, negative_BK = (x.reshape(B, K) for x in of_columns)
    best = Best(own_BK, negative_B, negative_BK)
    return Normalizers(max_B + jnp.log(sum_B), max_BK + jnp.log(sum_BK), best)


def _add_exponentials(max_R, sum_R, logits_RC, axis: int):
    """The largest logit and the sum of exponentials relative to it, with one more tile."""
    new_max_R = jnp.maximum(max_R, logits_RC.max(axis))
    tile_sum_R = jnp.exp(logits_RC - jnp.expand_dims(new_max_R, axis)).sum(axis)
    return new_max_R, sum_R * jnp.exp(max_R - new_max_R) + tile_sum_R


def _normalizer_gradients_device(
    size: int, axes, image_BD, logsumexp_B, cotangent_B, text_BKD, logsumexp_BK, cotangent_BK, scale
):
    """The normalisers' derivative in the logits, summed: (times texts, times images)."""
    B, K, D = text_BKD.shape

    def tile(rows, columns, pairs: Pairs, of_rows, of_columns):
        image_RD, logsumexp_R, cotangent_R = rows
        text_CD, logsumexp_C, cotangent_C = columns
        logits_RC = _tile_logits(image_RD, text_CD, pairs, scale, 0)
        slope_RC = cotangent_R[:, None] * jnp.exp(logits_RC - logsumexp_R[:, None])
        slope_RC += cotangent_C[None, :] * jnp.exp(logits_RC - logsumexp_C[None, :])
        slope_RC = slope_RC.astype(text_CD.dtype)
        (to_image_RD,), (to_text_CD,) = of_rows, of_columns
        to_image_RD += _matmul(slope_RC, text_CD)
        return (to_image_RD,), (to_text_CD + _matmul(slope_RC.T, image_RD),)

    rows = image_BD, logsumexp_B, cotangent_B
    columns = text_BKD.reshape(B * K, D), logsumexp_BK.reshape(B * K), cotangent_BK.reshape(B * K)
    entry = (Start(0.0, (D,)),)
    (to_image_BD,), (to_text_TD,) = walk(
        tile, rows, columns, entry, entry, per_image=K, size=size, axes=axes
    )
    return to_image_BD, to_text_TD.reshape(B, K, D)


def _matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
