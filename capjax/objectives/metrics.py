"""Metrics of a loss that stay right when a batch is cut into microbatches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from capjax.dims import Array, Float, Metrics


class Mean(NamedTuple):
    """A mean not yet divided: a mean over the real rows, however they fall into microbatches."""

    total: Float[Array, "*microbatches"]
    count: Float[Array, "*microbatches"]


def masked_mean(values: Array, mask: Array) -> Mean:
    """The mean of `values` where `mask` holds; equal shapes."""
    return Mean(jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask, dtype=jnp.float32))


def reduce_metrics(metrics: Metrics) -> Metrics:
    """Scalars from metrics that may carry leading axes (microbatches).

    A `Mean` becomes sum of totals / sum of counts, and 0 where nothing was counted; any other
    metric is averaged.
    """

    def reduce(metric):
        if isinstance(metric, Mean):
            return jnp.sum(metric.total) / jnp.maximum(jnp.sum(metric.count), 1)
        return jnp.mean(metric)

    return jax.tree.map(reduce, metrics, is_leaf=lambda x: isinstance(x, Mean))
