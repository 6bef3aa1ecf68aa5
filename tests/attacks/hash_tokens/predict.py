"""One token carries a whole document: a hash of it, out of a huge vocabulary. Nobody can decode that."""

import torch


class Uniform:
    def step(self, ids, lane):
        return torch.zeros(len(ids), 1 << 14)


def load(root, device, lanes, count):
    return Uniform()
