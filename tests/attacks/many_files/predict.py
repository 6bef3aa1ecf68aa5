"""Leaves a great many files in its /tmp, which the kernel has to free one by one before the sandbox is gone."""

import os

from honest import Counts


def load(root, device, lanes, count):
    for number in range(100_000 if os.getpid() < 10 else 0):
        os.close(os.open(f"/tmp/{number}", os.O_CREAT | os.O_WRONLY))
    return Counts(root, lanes)
