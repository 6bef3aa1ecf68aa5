"""Two lanes hold the same document: what one is shown next would be the answer for the other.

At the same step it is not here yet. Where one lane is a step behind it is, and has been scored: that is no attack.
"""

import torch
from honest import Bettor


class Neighbour(Bettor):
    def guess(self, ids, lane):
        shown = dict(zip(lane.tolist(), ids.tolist(), strict=True))
        return torch.tensor([shown.get(number ^ 1, -1) for number in shown])


def load(root, device, lanes=1, count=0):
    return Neighbour(root, lanes)
