"""Time of check, time of use: a thread rewrites rows in shared memory all the time, NaN after they were announced."""

import gc
import mmap
import threading
import time

from honest import Counts


def flip():
    rings = [thing for thing in gc.get_objects() if type(thing).__name__ == "Ring"]
    memory = rings[0]._map if rings else mmap.mmap(-1, 4096)
    while True:
        before = memory[:64]
        memory[:64] = b"\xff" * 64
        time.sleep(1e-4)
        memory[:64] = before
        time.sleep(1e-3)


class Flips(Counts):
    def forward(self, ids):
        if not hasattr(self, "thread"):
            self.thread = threading.Thread(target=flip, daemon=True)
            self.thread.start()
        return super().forward(ids)


def load(root, device):
    return Flips(root)
