"""However the blocks are run, they compute the same."""

import dataclasses

import jax
import pytest

from capjax.planning.flops import count_flops


@pytest.fixture(scope="module")
def reference(config, params, batch, loss_and_gradient):
    return loss_and_gradient(config, params, batch)


@pytest.mark.parametrize(
    "fields",
    [
        {"scan": False},
        {"remat": "full"},
        {"remat": "dots"},
        {"scan": False, "remat": "full"},
    ],
    ids=str,
)
def test_scan_and_remat_change_nothing(
    fields, reference, config, params, batch, loss_and_gradient, assert_trees_close
):
    found = loss_and_gradient(dataclasses.replace(config, **fields), params, batch)
    assert_trees_close(found, reference, 2e-6)


def test_what_is_computed_again(config, params, batch, loss_and_gradient):
    """Nothing; "dots": of all matmuls those of attention alone; "full": the whole forward pass."""
    flops = {}
    for remat in ("none", "dots", "full"):
        fields = dataclasses.replace(config, remat=remat)
        jaxpr = jax.make_jaxpr(lambda p, b, c=fields: loss_and_gradient(c, p, b))(params, batch)
        flops[remat] = count_flops(jaxpr, unknown_trips=8)
    assert flops["none"] < flops["dots"] < 1.05 * flops["none"]
    assert flops["full"] > 1.2 * flops["none"]


def test_bfloat16_is_close(reference, config, params, batch, loss_and_gradient, assert_trees_close):
    found = loss_and_gradient(dataclasses.replace(config, dtype="bfloat16"), params, batch)
    assert found[0] == pytest.approx(reference[0], rel=5e-3)
    assert_trees_close(found[1], reference[1], 0.1)
