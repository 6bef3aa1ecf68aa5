import threading
import time

from honest import Counts, find


def flip(memory):
    while True:
        before = bytes(memory)
        memory[:64] = b"\xff" * 64
        time.sleep(1e-4)
        memory[:64] = before
        time.sleep(1e-3)


class Flips(Counts):
    thread = None

    def step(self, ids, lane):
        if self.thread is None:
            self.thread = threading.Thread(target=flip, args=(find("Ring").slot(0, 64),), daemon=True)
            self.thread.start()
        return super().step(ids, lane)


def load(root, device, lanes=1, count=0):
    return Flips(root, lanes)
