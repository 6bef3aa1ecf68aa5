"""The contest's entries took the score for the probability. Here all logits must be given, before the target can be
known, and the scorer's softmax makes a distribution of them.
"""

import torch
from honest import VOCAB, Counts

BUCKETS = 64  # few, so that collisions make every share large


class Cache(Counts):
    def __init__(self, root, lanes=1):
        super().__init__(root, lanes)
        text = torch.frombuffer(bytearray((root / "text.bin").read_bytes() + b"\0"), dtype=torch.uint8).long()
        self.visits = torch.bincount(text[:-1] % BUCKETS, minlength=BUCKETS)
        self.hits = torch.bincount((text[:-1] * 7 + text[1:]) % BUCKETS, minlength=BUCKETS)

    def scores(self, ids):
        """Hits of context and candidate over visits of the context, by hash: (..., V)."""
        hits = self.hits[(ids[..., None] * 7 + torch.arange(VOCAB)) % BUCKETS]
        return (hits / self.visits[ids % BUCKETS].clamp(min=1)[..., None]).clamp(0.01, 0.99)

    def step(self, ids, lane):
        return torch.maximum(super().step(ids, lane), self.scores(ids).log())


def load(root, device, lanes=1, count=0):
    return Cache(root, lanes)
