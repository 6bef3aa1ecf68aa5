"""A step later the other lane's token has been scored: using it then is no attack."""

import torch
from honest import Bettor


class Neighbour(Bettor):
    def guess(self, ids, lane):
        shown = dict(zip(lane.tolist(), ids.tolist(), strict=True))
        return torch.tensor([shown.get(number ^ 1, -1) for number in shown])


def load(root, device, lanes=1, count=0):
    return Neighbour(root, lanes)
