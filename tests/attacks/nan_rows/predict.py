import torch
from honest import Counts


class NanRows(Counts):
    def step(self, ids, lane):
        logits = super().step(ids, lane)
        return torch.where(logits.amax(-1, keepdim=True) < -1, torch.nan, logits)


def load(root, device, lanes=1, count=0):
    return NanRows(root, lanes)
