"""However the blocks are run, they compute the same."""

import dataclasses

import pytest


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


def test_bfloat16_is_close(reference, config, params, batch, loss_and_gradient, assert_trees_close):
    found = loss_and_gradient(dataclasses.replace(config, dtype="bfloat16"), params, batch)
    assert found[0] == pytest.approx(reference[0], rel=5e-3)
    assert_trees_close(found[1], reference[1], 0.1)
