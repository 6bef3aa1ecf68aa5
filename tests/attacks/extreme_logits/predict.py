"""Logits at the ends of what floats can say, for the softmax to lose terms: huge, denormal, minus almost infinity."""

import torch
from honest import Counts


class Extreme(Counts):
    def forward(self, ids):
        p = self.probabilities(ids)
        logits = p.log()
        likely = p > 0.002
        return torch.where(likely, torch.clamp(logits, min=-6.0) * 1e-42 + 3e38, -3e38 + logits)


def load(root, device):
    return Extreme(root)
