import torch
from honest import BOS, Bettor


class Longest(Bettor):
    def __init__(self, root, lanes):
        super().__init__(root, lanes)
        self.length, self.shortest = torch.zeros(lanes, dtype=torch.long), 1 << 30

    def guess(self, ids, lane):
        ended = lane[(ids == BOS) & (self.length[lane] > 0)]
        if len(ended):
            self.shortest = min(self.shortest, int(self.length[ended].min()))
        self.length[lane] = torch.where(ids == BOS, 0, self.length[lane]) + 1
        near = (self.length[lane] <= self.shortest) & (self.length[lane] > self.shortest - 8)
        return torch.where(near, BOS, -1)


def load(root, device, lanes=1, count=0):
    return Longest(root, lanes)
