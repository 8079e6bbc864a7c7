"""The search for the largest batch, on memory that is affine, bent, or never enough."""

import math

import pytest

from capjax.planning.fit import MAX_COMPILES, advice, gib, largest_batch


def search(bytes_of, *, available=1000, unit=4, first=16, fixed=0):
    return largest_batch(bytes_of, available=available, unit=unit, first=first, fixed=fixed)


@pytest.mark.parametrize("first", [4, 16, 996, 4000])
def test_affine_memory_takes_few_compiles(first):
    def bytes_of(batch):
        return 100 + 3 * batch

    found, tries = search(bytes_of, first=first)
    assert found == 300  # 100 + 3 * 300 is all there is
    assert len(tries) <= 4
    assert all(
        size.batch_size % 4 == 0 and bytes_of(size.batch_size) == size.bytes for size in tries
    )


@pytest.mark.parametrize("power", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("first", [8, 512])
def test_bent_memory_gives_a_batch_that_was_compiled_and_fits(power, first):
    def bytes_of(batch):
        return int(100 + 10 * batch**power)

    found, tries = search(bytes_of, available=20_000, first=first)
    largest = math.floor(1990 ** (1 / power)) // 4 * 4
    assert len(tries) <= MAX_COMPILES
    assert found in [one.batch_size for one in tries]
    assert bytes_of(found) <= 20_000
    assert found >= 0.9 * largest


def test_what_cannot_fit():
    found, tries = search(lambda batch: 2000 + batch)
    assert found == 0
    assert min(one.batch_size for one in tries) == 4  # the least was tried


def words(**changes):
    settings = {
        "needed": 4 * 2**30,
        "available": 3 * 2**30,
        "state": 2**30,
        "gradients": 2**29,
        "batch_size": 1024,
        "accumulation_steps": 1,
        "unit": 8,
        "fsdp": 8,
        "num_copies": 2,
        "remat": "dots",
    }
    return "\n".join(advice(**settings | changes))


def test_advice_has_figures_that_would_fit():
    text = words()
    assert "1.50 GiB a device at fsdp=8; 0.75 GiB at mesh.fsdp=16" in text
    assert "model.remat=full" in text
    assert "2.5 MiB a device for an image" in text
    assert "batch_size=608" in text  # 1.5 GiB of 2.5 MiB each: 614, in eights
    assert "accumulation_steps=2" in text
    assert "remat" not in words(remat="full")


def test_advice_where_no_batch_helps():
    assert "no batch fits" in words(state=3 * 2**30, needed=5 * 2**30)


def test_bytes_in_words():
    assert (gib(3 * 2**30), gib(2**20)) == ("3.00 GiB", "1.0 MiB")
