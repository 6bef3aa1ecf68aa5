import torch
from honest import Counts


class Small(Counts):
    def step(self, ids, lane):
        logits = super().step(ids, lane)
        logits = logits - logits.amax(-1, keepdim=True)
        return torch.clamp(logits, min=-6.2).bfloat16()


def load(root, device, lanes=1, count=0):
    return Small(root, lanes)
