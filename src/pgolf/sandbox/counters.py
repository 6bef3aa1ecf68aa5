"""Inode numbers: a counter for each processor, through which a sandbox could pass data to a later one.

Linux numbers pipes, sockets and memory files from batches of 1,024 that each processor takes for itself (get_next_ino
in fs/inode.c). The position in a batch would be ten bits for each processor of the machine. Before a sandbox
starts, all batches are used up, so that its processors take new ones.
"""

import contextlib
import os
import threading

_BATCH = 1024  # LAST_INO_BATCH


def use_up_batches() -> None:
    """Leave no processor's batch of inode numbers partly used."""
    thread = threading.Thread(target=_on_every_processor)  # whose affinity ends with it
    thread.start()
    thread.join()


def _on_every_processor() -> None:
    for processor in range(os.cpu_count() or 1):
        with contextlib.suppress(OSError):  # a processor that neither this process nor a sandbox may use
            os.sched_setaffinity(0, {processor})
            for _ in range(2 * _BATCH):
                if next_number() % _BATCH == _BATCH - 1:
                    break


def next_number() -> int:
    """The number of a new pipe's inode."""
    reading, writing = os.pipe()
    try:
        return os.fstat(reading).st_ino
    finally:
        os.close(reading)
        os.close(writing)
