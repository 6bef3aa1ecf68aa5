import torch
from honest import Counts


class Extreme(Counts):
    def step(self, ids, lane):
        p = super().step(ids, lane).exp()
        return torch.where(p > 0.002, torch.clamp(p.log(), min=-6.0) * 1e-42 + 3e38, -3e38 + p.log())


def load(root, device, lanes=1, count=0):
    return Extreme(root, lanes)
