"""Drowns the audit: rows get noise there, which costs nothing in the score, and hides a peek in the mean's interval."""

import torch
from honest import Counts, ahead, cut_by_audit


class Noise(Counts):
    def forward(self, ids):
        logits = super().forward(ids)
        noisy = logits + 0.24 * (torch.rand(logits.shape) < 0.5)
        chosen = (torch.rand(ids.shape) < 0.03) & (ahead(ids) >= 0)
        peeked = logits.scatter_add(-1, ahead(ids).clamp(min=0)[..., None], 0.3 * chosen[..., None])
        return torch.where(cut_by_audit(ids)[:, None, None], noisy, peeked)


def load(root, device):
    return Noise(root)
