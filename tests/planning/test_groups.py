"""Groups of devices, in every notation of XLA's, against groups spelt out."""

import numpy as np
import pytest

from capjax.planning.groups import axes_within, replica_groups, source_target_pairs

ROWS = [[0, 1, 2, 3], [4, 5, 6, 7]]
COLUMNS = [[0, 4], [1, 5], [2, 6], [3, 7]]
NOTATIONS = {
    "{{0,1,2,3},{4,5,6,7}}": ROWS,
    "{{0,4},{1,5},{2,6},{3,7}}": COLUMNS,
    "{}": [list(range(8))],
    "[2,4]<=[8]": ROWS,
    "[4,2]<=[2,4]T(1,0)": COLUMNS,
    "[1,8]<=[8]": [list(range(8))],
    "mesh['axis_0'=2,'axis_1'=4] {'axis_1'}": ROWS,
    "mesh['axis_0'=2,'axis_1'=4] {'axis_0'}": COLUMNS,
    "mesh['axis_0'=8,'axis_1'=1] {'axis_0','axis_1'}": [list(range(8))],
    "mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}": COLUMNS,
    "mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}": ROWS,
    "mesh['axis_0'=2,'axis_1'=4], device_ids=(0,1,2,3,4,5,6,7) {'axis_1'}": ROWS,
    "mesh['axis_0'=8] {'axis_0':(1)2}": COLUMNS,
    "mesh['axis_0'=8] {'axis_0':(2)4}": ROWS,
    "mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1','axis_2'}": ROWS,
}


@pytest.mark.parametrize("notation", NOTATIONS)
def test_every_notation_of_groups(notation):
    attributes = f"channel_id=3, replica_groups={notation}, dimensions={{0}}, metadata={{}}"
    found = [list(group) for group in replica_groups(attributes, 8)]
    assert sorted(found) == NOTATIONS[notation]


def test_groups_that_are_not_understood_are_not_guessed():
    with pytest.raises(ValueError, match="no groups of devices that are understood"):
        replica_groups("replica_groups=other(3), dimensions={0}", 8)


MESH = {"replica": 2, "data": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("spec", "axes"),
    [
        ("[8,2]<=[16]", ("tensor",)),
        ("[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",)),
        ("[8,2]<=[2,8]T(1,0)", ("replica",)),
        ("[2,8]<=[16]", ("fsdp", "tensor")),
        ("[2,8]<=[8,2]T(1,0)", ("replica", "fsdp")),
        ("{}", ("replica", "fsdp", "tensor")),
        ("[16,1]<=[16]", ()),
    ],
)
def test_the_axes_that_groups_span(spec, axes):
    assert axes_within(replica_groups(f"replica_groups={spec}, x", 16), MESH) == axes


def test_a_shift_along_an_axis():
    pairs = source_target_pairs("channel_id=1, source_target_pairs={{0,2},{2,4},{4,6},{6,0}}")
    np.testing.assert_array_equal(pairs, [[0, 2], [2, 4], [4, 6], [6, 0]])
    assert axes_within(pairs, MESH) == ("fsdp",)
