"""Cores and memory of the machine, and how processes end on it."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import psutil

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes of memory that the machine can still give."""
    return int(psutil.virtual_memory().available)


def suspended_seconds() -> float:
    """How long the machine has slept since it was started: one of the clocks goes on meanwhile."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit, so that sandboxes are torn down."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: sys.exit(128 + got))


def end_with_parent(parent: int) -> None:
    """Let the kernel (Linux) send this process SIGTERM when its parent ends, even by SIGKILL.

    `parent` is the parent's process number: where it ended before this call, this process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that end with this one. All are forked on entry, before the caller takes locks."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (os.getpid(),))
    try:
        pool.submit(os.getpid).result()  # the first task forks all of them
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(parent)
