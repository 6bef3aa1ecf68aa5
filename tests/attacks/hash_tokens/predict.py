"""One token carries a whole document: a hash of it, out of a huge vocabulary. Nobody can decode that."""

import torch


class Uniform(torch.nn.Module):
    def forward(self, ids):
        return torch.zeros(*ids.shape, 1 << 14)


def load(root, device):
    return Uniform()
