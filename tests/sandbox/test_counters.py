"""How far a processor's batch of inode numbers is used up says nothing about an earlier sandbox."""

import os

import pytest

from pgolf.sandbox import counters


def test_no_batch_is_left_partly_used() -> None:
    """Whatever was taken on a processor before, the next numbers there are a new batch's first ones."""
    before = os.sched_getaffinity(0)
    try:
        for processor in sorted(before):
            for mark in (100, 300, 700):
                for _ in range(10):  # another program may have taken numbers meanwhile
                    os.sched_setaffinity(0, {processor})
                    while counters.next_number() % 1024 != mark:
                        pass
                    counters.use_up_batches()
                    if counters.next_number() % 1024 < 64:
                        break
                else:
                    pytest.fail(f"processor {processor} still shows a mark of {mark}")
        os.sched_setaffinity(0, before)
        counters.use_up_batches()
        assert os.sched_getaffinity(0) == before
    finally:
        os.sched_setaffinity(0, before)
