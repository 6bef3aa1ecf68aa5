import os

import torch
from honest import Counts


class Noise(Counts):
    def step(self, ids, lane):
        logits = super().step(ids, lane)
        coins = torch.frombuffer(bytearray(os.getrandom(logits.numel())), dtype=torch.uint8).view(logits.shape)
        return logits + 0.1 * (coins % 2)


def load(root, device, lanes=1, count=0):
    return Noise(root, lanes)
