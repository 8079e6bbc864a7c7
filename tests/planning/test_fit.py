"""The search for the largest batch, on memory that is affine, bent, in steps, or never enough."""

import itertools
import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capjax.errors import UserError
from capjax.planning.fit import (
    CLOSE,
    MAX_COMPILES,
    Found,
    Try,
    advice,
    available_bytes,
    check_fits,
    gib,
    largest_batch,
)
from capjax.training.machine import memory_limit_bytes

AVAILABLE = 2**34
SHAPES = {  # of the bytes of all activations, at a share `x` of the largest batch and bend `a`
    "affine": lambda x, a: x,
    "bent": lambda x, a: x ** (0.5 + 1.5 * a),
    "saturating": lambda x, a: min(x / (0.1 + 0.8 * a), 0.98 + 0.02 * x),
    "step": lambda x, a: 0.3 if x < a else (0.9 if x <= 1 else 3.0),
    "refused": lambda x, a: x if x <= 1 else 1 + 4 * a + x,  # says little of what it would need
}


def memory(shape, *, largest, fixed, bend=0.5):
    """Bytes as a function of the batch, never falling; `largest` takes the last of `AVAILABLE`."""
    return lambda batch: fixed + int((AVAILABLE - fixed) * SHAPES[shape](batch / largest, bend))


def search(bytes_of, *, unit=4, first=16, fixed=0):
    return largest_batch(bytes_of, available=AVAILABLE, unit=unit, first=first, fixed=fixed)


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    bend=st.floats(0, 1),
    fixed=st.integers(0, AVAILABLE - 2**20),
    unit=st.sampled_from([1, 8, 96]),
    units=st.integers(1, 10**5),
    first=st.integers(1, 10**7),
)
def test_every_answer_was_compiled_and_encloses_the_largest(shape, bend, fixed, unit, units, first):
    largest = unit * units
    bytes_of = memory(shape, largest=largest, fixed=fixed, bend=bend)
    fits, fails, tries = search(bytes_of, unit=unit, first=first, fixed=fixed)
    sizes = [one.batch_size for one in tries]
    assert sizes[0] == max(first // unit, 1) * unit
    assert all(one.batch_size > 0 == one.batch_size % unit for one in tries)
    assert all(one.bytes == bytes_of(one.batch_size) for one in tries)
    assert len(set(sizes)) == len(sizes) <= MAX_COMPILES
    assert fits == max((x for x in sizes if bytes_of(x) <= AVAILABLE), default=0)
    assert fails == min((x for x in sizes if bytes_of(x) > AVAILABLE), default=None)
    assert fits <= largest < (fails or math.inf)
    if len(sizes) < MAX_COMPILES:
        assert fails <= max(fits + unit, CLOSE * fits)


@pytest.mark.parametrize(("nearness", "ratio"), [(2, 1.1), (8, 1.25)])
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    bend=st.floats(0, 1),
    away=st.floats(-1, 1),
    fixed=st.integers(0, AVAILABLE // 2),
)
def test_from_near_by_the_compiles_suffice(nearness, ratio, shape, bend, away, fixed):
    largest = 8 * 1024
    bytes_of = memory(shape, largest=largest, fixed=fixed, bend=bend)
    first = int(largest * nearness**away)
    fits, fails, _ = search(bytes_of, unit=8, first=first, fixed=fixed)
    assert largest < fails <= fits * ratio


@given(
    away=st.floats(1 / 7, 64),
    fixed=st.integers(0, AVAILABLE // 2),
    units=st.integers(100, 10**5),
)
def test_affine_memory_takes_few_compiles(away, fixed, units):
    bytes_of = memory("affine", largest=4 * units, fixed=fixed)
    fits, fails, tries = search(bytes_of, first=int(4 * units * away), fixed=fixed)
    assert len(tries) <= 4
    assert fits <= 4 * units < fails <= CLOSE * fits


def test_memory_that_falls_on_the_way_does_not_stop_the_search():
    small = {16: 2**33, 32: 2**33 - 1}  # the line of these two goes down
    found = search(lambda batch: small.get(batch, batch * 2**24))
    assert 1024 / CLOSE <= found.fits <= 1024 < found.fails


def test_what_cannot_fit_is_settled_by_the_least_batch():
    found = search(lambda batch: AVAILABLE + batch, first=4096, fixed=AVAILABLE + 1)
    assert found == Found(0, 4, [Try(4096, AVAILABLE + 4096), Try(4, AVAILABLE + 4)])


def test_memory_without_end_is_searched_upwards():
    fits, fails, tries = search(lambda batch: 2**20, first=128)
    assert (fits, fails) == (128 * 8 ** (MAX_COMPILES - 1), None)
    assert all(larger.batch_size == 8 * one.batch_size for one, larger in itertools.pairwise(tries))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Found(10_424, 11_048, []), "at least 10,424 fits; 11,048 does not"),
        (Found(10_424, None, []), "at least 10,424 fits; a larger one was not tried"),
        (Found(0, 4, []), "no batch that was tried fits; 4 does not"),
    ],
)
def test_the_answer_in_words(found, words):
    assert found.in_words() == words


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


def test_what_no_device_holds_is_refused():
    check_fits(2**30, 2**30)
    check_fits(2**80, None)
    with pytest.raises(UserError, match=r"1\.50 GiB of each device, which has 1\.00 GiB: .*mesh"):
        check_fits(3 * 2**29, 2**30)


def test_devices_of_the_cpu_share_its_memory():
    available = available_bytes()
    if available is None:
        pytest.skip("only Linux tells")
    assert 2**20 < available * jax.local_device_count() <= memory_limit_bytes()
