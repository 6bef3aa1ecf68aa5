"""The clock stands still until it is started, and counts down from its limit."""

import time

from pgolf.train.clock import Clock


def test_counts_from_start_only() -> None:
    clock = Clock(5.0)
    time.sleep(0.02)
    assert clock.elapsed() == 0.0
    assert clock.remaining() == 5.0
    clock.start()
    time.sleep(0.02)
    first = clock.elapsed()
    assert 0.02 <= first <= clock.elapsed()
    assert clock.remaining() <= 5.0 - first


def test_goes_below_zero_and_never_without_a_limit() -> None:
    late, free = Clock(0.01), Clock()
    late.start()
    free.start()
    time.sleep(0.02)
    assert late.remaining() < 0
    assert free.remaining() == float("inf")
