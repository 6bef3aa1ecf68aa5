"""Flips logits in shared memory all the time, to NaN and back, between announcement and copy among others."""

import threading
import time

from honest import Counts, find


def flip(memory):
    while True:
        before = memory[:64]
        memory[:64] = b"\xff" * 64
        time.sleep(1e-4)
        memory[:64] = before
        time.sleep(1e-3)


class Flips(Counts):
    thread = None

    def step(self, ids, lane):
        if self.thread is None:
            self.thread = threading.Thread(target=flip, args=(find("Ring")._map,), daemon=True)
            self.thread.start()
        return super().step(ids, lane)


def load(root, device, lanes=1, count=0):
    return Flips(root, lanes)
