"""What a client may ask, and how often."""

import pytest

from capjax.errors import UserError
from capjax.serving.limits import Limits, RateLimiter


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_burst_then_a_steady_rate():
    clock = Clock()
    rates = RateLimiter(per_minute=60.0, burst=3, clock=clock)
    assert [rates.take("a") for _ in range(4)] == [0, 0, 0, 1.0]
    assert rates.take("b") == 0  # another client has its own
    clock.now += 0.5
    assert rates.take("a") == pytest.approx(0.5)  # being refused costs nothing
    clock.now += 0.5
    assert [rates.take("a"), rates.take("a")] == [0, 1.0]
    clock.now += 1000
    assert [rates.take("a") for _ in range(4)] == [0, 0, 0, 1.0]  # no more than the burst


def test_clients_that_are_gone_are_forgotten():
    clock = Clock()
    rates = RateLimiter(per_minute=60.0, burst=3, clock=clock)
    for client in range(100):
        clock.now += 1
        rates.take(str(client))
        assert len(rates) <= 5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_size": 6}, "batch_size=6: expected a power of two"),
        ({"batch_size": 0}, "batch_size=0: expected a positive number"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
        ({"wait_s": -1.0}, "wait_s=-1.0"),
        ({"max_pixels": 1 << 27}, "max_pixels=.*: expected at most 67108864"),
    ],
)
def test_limits_are_checked(fields, words):
    assert Limits(wait_s=0.0).wait_s == 0
    with pytest.raises(UserError, match=words):
        Limits(**fields)
