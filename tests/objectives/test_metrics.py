"""Metrics reduced over microbatches equal those of the whole batch."""

import jax.numpy as jnp
import numpy as np

from capjax.objectives.metrics import Mean, masked_mean, reduce_metrics


def test_masked_mean_is_right_over_microbatches_of_unequal_counts():
    values, mask = np.arange(6.0), np.array([1, 1, 1, 0, 0, 1], bool)
    parts = zip(values.reshape(3, 2), mask.reshape(3, 2), strict=True)
    means = [masked_mean(jnp.asarray(part), jnp.asarray(real)) for part, real in parts]
    stacked = Mean(*(jnp.stack(x) for x in zip(*means, strict=True)))
    metrics = reduce_metrics({"mean": stacked, "scalar": jnp.array([1.0, 3.0, 5.0])})
    np.testing.assert_allclose(metrics["mean"], values[mask].mean())
    np.testing.assert_allclose(metrics["scalar"], 3)


def test_nothing_counted_is_zero():
    assert reduce_metrics({"mean": masked_mean(jnp.ones(3), jnp.zeros(3, bool))})["mean"] == 0


def test_masked_values_may_be_anything():
    mean = masked_mean(jnp.array([jnp.nan, 2.0]), jnp.array([False, True]))
    assert reduce_metrics({"mean": mean})["mean"] == 2
