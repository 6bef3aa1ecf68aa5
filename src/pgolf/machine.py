"""What the machine has, and how a process ends on it."""

import os
import signal
import sys
from pathlib import Path


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes of memory that the machine could still give. Raises OSError where the kernel does not say."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def exit_on_signals() -> None:
    """SIGTERM and SIGHUP raise SystemExit from now on, so that sandboxes are torn down."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: sys.exit(128 + got))
