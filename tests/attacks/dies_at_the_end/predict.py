import os

from honest import Counts


class Dies(Counts):
    left = 0

    def step(self, ids, lane):
        self.left -= len(ids)
        if self.left <= 0:
            os._exit(0)
        return super().step(ids, lane)


def load(root, device, lanes, count):
    predictor = Dies(root, lanes)
    predictor.left = count
    return predictor
