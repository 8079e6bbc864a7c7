"""Which requests go to the device together. What the device does is replaced."""

import threading

import numpy as np
import pytest

from capjax.decoding.options import DecodingOptions
from capjax.errors import UserError
from capjax.serving import batcher as batcher_module
from capjax.serving.batcher import Batcher
from capjax.serving.limits import Limits
from capjax.serving.metrics import Metrics
from capjax.serving.parameters import Parameters

IMAGE = np.zeros((16, 16, 3), np.uint8)
WAIT = 60.0


def asked(key="", seed=0, **fields):
    return Parameters(DecodingOptions(max_length=12, **fields), seed, "", key)


class Device:
    """Records the batches; each waits until it is let through."""

    def __init__(self):
        self.batches = []
        self.begun = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def __call__(self, captioner, images, parameters, batch_size):
        self.batches.append([one.key for one in parameters])
        self.begun.release()
        assert self.gate.acquire(timeout=WAIT)
        if parameters[0].key == "bad":
            raise MemoryError("no room")
        return [{"key": one.key, "caption": "x"} for one in parameters]


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(batcher_module, "caption_batch", device)
    return device


@pytest.fixture
def make(captioner, device):
    """Makes a started batcher whose first batch, of one image, is under way."""
    made = []

    def make(**limits):
        batcher = Batcher(captioner, Limits(**{"wait_s": 0.0, **limits}), Metrics())
        made.append(batcher)
        batcher.start()
        batcher.submit(IMAGE, asked("first"))
        assert device.begun.acquire(timeout=WAIT)
        return batcher

    yield make
    device.gate.release(1000)
    for batcher in made:
        batcher.close()


def test_equal_options_share_a_batch_and_the_oldest_goes_first(make, device):
    batcher = make(batch_size=4)
    waiting = [
        batcher.submit(IMAGE, one)
        for one in (
            *(asked(f"beam{i}", num_beams=2) for i in range(2)),
            *(asked(f"greedy{i}", seed=i) for i in range(6)),
            asked("warm", temperature=0.5),
            asked("warmer", temperature=0.6),
            asked("beam2", num_beams=2),
        )
    ]
    assert batcher.num_waiting() == 11
    device.gate.release(1000)
    assert [future.result(WAIT)["key"] for future in waiting[-1:]] == ["beam2"]
    for future in waiting:
        future.result(WAIT)
    assert device.batches == [
        ["first"],
        ["beam0", "beam1", "beam2"],
        ["greedy0", "greedy1", "greedy2", "greedy3"],
        ["greedy4", "greedy5"],
        ["warm"],
        ["warmer"],
    ]


def test_images_wait_for_others_until_the_batch_is_full(captioner, device):
    batcher = Batcher(captioner, Limits(wait_s=WAIT, batch_size=2), Metrics())
    batcher.start()
    device.gate.release(1000)
    waiting = [batcher.submit(IMAGE, asked(key)) for key in "ab"]
    assert [future.result(WAIT)["key"] for future in waiting] == ["a", "b"]
    assert device.batches == [["a", "b"]]
    batcher.close()


def test_what_waits_is_captioned_before_it_stops(make, device):
    batcher = make()
    waiting = [batcher.submit(IMAGE, asked(key)) for key in "abc"]
    device.gate.release(1000)
    batcher.close()
    assert [future.result(0)["key"] for future in waiting] == ["a", "b", "c"]
    with pytest.raises(RuntimeError, match="stopping"):
        batcher.submit(IMAGE, asked())


def test_a_caller_who_gave_up_costs_no_row(make, device):
    batcher = make()
    waiting = [batcher.submit(IMAGE, asked(key)) for key in "abc"]
    assert waiting[1].cancel()
    device.gate.release(1000)
    assert [waiting[i].result(WAIT)["key"] for i in (0, 2)] == ["a", "c"]
    assert device.batches == [["first"], ["a", "c"]]


def test_a_batch_that_fails_is_the_only_one(make, device):
    batcher = make(batch_size=1)
    bad, good = batcher.submit(IMAGE, asked("bad")), batcher.submit(IMAGE, asked("good"))
    device.gate.release(1000)
    with pytest.raises(MemoryError):
        bad.result(WAIT)
    assert good.result(WAIT)["key"] == "good"


def test_a_client_cannot_make_it_compile_for_ever(make):
    batcher = make(max_structures=2)
    for options in ({}, {"guidance_scale": 2.0}, {"guidance_scale": 3.0}):
        batcher.admit(asked(**options).options)
    with pytest.raises(
        UserError, match=r"beam num_beams=2 max_length=12: .* one of these: greedy max_length=12; "
    ):
        batcher.admit(asked(num_beams=2).options)


def test_a_warm_up_compiles_every_size_or_says_why_not(captioner, device):
    events = []
    batcher = Batcher(
        captioner, Limits(batch_size=4), Metrics(), [asked().options], lambda: events.append("go")
    )
    device.gate.release(1000)
    batcher.start()
    assert batcher.submit(IMAGE, asked("a")).result(WAIT)["key"] == "a"
    assert [len(keys) for keys in device.batches] == [1, 2, 4, 1]
    assert (events, batcher.is_ready) == (["go"], True)
    batcher.close()


def test_a_failed_warm_up_is_told(captioner, monkeypatch):
    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(batcher_module, "caption_batch", fail)
    events = []
    batcher = Batcher(
        captioner,
        Limits(),
        Metrics(),
        [asked().options],
        on_failure=lambda: events.append(type(batcher.failure)),
    )
    batcher.start()
    batcher.close()
    assert (events, batcher.is_ready) == ([MemoryError], False)
