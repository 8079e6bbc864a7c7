"""The chips: found by JAX's names, and figures that hold together."""

import pytest

from capjax.chips import CHIPS, chip_of


def test_every_chip_is_found_by_what_jax_calls_it():
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(set(kinds)) == len(kinds)
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert all(chip_of(kind) is chip for kind in chip.device_kinds)
    assert chip_of("TPU v5 lite") is CHIPS["v5e"]
    assert chip_of("TPU v5") is CHIPS["v5p"]


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "TPU v2", ""])
def test_others_are_unknown(kind):
    assert chip_of(kind) is None


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_what_is_farther_is_slower(chip):
    assert chip.network_bandwidth < chip.link_bandwidth < chip.memory_bandwidth
    # A chip reads its whole memory in 15 to 50 ms, and computes a few hundred FLOPs a byte.
    assert 0.01 < chip.memory_bytes / chip.memory_bandwidth < 0.05
    assert 150 < chip.peak_flops / chip.memory_bandwidth < 600
    is_gpu = chip.device_kinds[0].startswith("NVIDIA")
    assert chip.num_axes in ((0,) if is_gpu else (2, 3))


def test_a_pod_of_v5e_reduces_as_fast_as_stated():
    """Google states 51.2 TB/s for the 256 chips of a v5e pod: the links of all of them."""
    assert 256 * CHIPS["v5e"].link_bandwidth == 51.2e12
