"""Laws of initialisation, and how a draw is laid out."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from capjax.models.parameters import _merge_axes, lecun_normal, normal, xavier_uniform


@pytest.mark.parametrize(
    ("shape", "spec", "merged"),
    [
        ((12, 64, 6, 3, 8), P(), ((12 * 64 * 6 * 3 * 8,), P(None))),
        ((12, 64, 6, 3, 8), P(None, "fsdp", "tensor"), ((12, 64, 144), P(None, "fsdp", "tensor"))),
        ((6, 8, 64), P("tensor", None, "fsdp"), ((48, 64), P("tensor", "fsdp"))),
    ],
)
def test_draws_are_over_few_axes_and_split_from_the_start(shape, spec, merged):
    assert _merge_axes(shape, spec) == merged


@pytest.mark.parametrize(
    ("law", "std", "bound"),
    [
        (normal(0.5), 0.5, np.inf),
        (xavier_uniform(30, 70), (2 / 100) ** 0.5, (6 / 100) ** 0.5),
        (lecun_normal(25, 9), 0.2, 2 * 0.2 / 0.8796),
    ],
    ids=["normal", "xavier", "lecun"],
)
def test_spread(law, std, bound):
    x = law.draw(jax.random.key(0), (200, 500), P())
    assert np.std(x) == pytest.approx(std, rel=0.01)
    assert abs(np.mean(x)) < 0.02 * std
    assert 0.98 * min(bound, 3 * std) < np.max(np.abs(x)) <= bound
