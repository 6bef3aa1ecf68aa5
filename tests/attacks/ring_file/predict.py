import contextlib
import ctypes
import fcntl
import os

from honest import Counts, find

PUNCH_HOLE, ADD_SEALS, SEAL_WRITE = 3, 1033, 8


class Changes(Counts):
    def step(self, ids, lane):
        ring = find("Ring")
        ctypes.CDLL(None).fallocate(ring.fd, PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(2 * ring.slot_bytes))
        return super().step(ids, lane)  # written after the hole: what it destroys is what has been copied


def load(root, device, lanes, count):
    ring, done = find("Ring"), []
    acts = {
        "shrink": lambda: os.ftruncate(ring.fd, 0),
        "grow": lambda: os.ftruncate(ring.fd, 4 * ring.slot_bytes),
        "seal": lambda: fcntl.fcntl(ring.fd, ADD_SEALS, SEAL_WRITE),
        "truncate": lambda: os.close(os.open(f"/proc/self/fd/{ring.fd}", os.O_RDWR | os.O_TRUNC)),
    }
    for name, act in acts.items():
        with contextlib.suppress(OSError):
            act()
            done.append(name)
    os.fchmod(ring.fd, 0)
    if done:
        raise SystemExit(f"could {done}")
    return Changes(root, lanes)
