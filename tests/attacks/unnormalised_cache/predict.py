"""A hashed n-gram cache asked for the true token only: the scores of all tokens would add up to far more than one.

The contest's entries took the score for the probability. Here a whole row must be given, before the target can be
known, and the scorer's softmax makes a distribution of it.
"""

import torch
from honest import VOCAB, Counts

BUCKETS = 64  # few, so that collisions make every share large


class Cache(Counts):
    def __init__(self, root):
        super().__init__(root)
        text = torch.frombuffer(bytearray((root / "text.bin").read_bytes()), dtype=torch.uint8).long()
        self.visits = torch.bincount(text[:-1] % BUCKETS, minlength=BUCKETS)
        self.hits = torch.bincount((text[:-1] * 7 + text[1:]) % BUCKETS, minlength=BUCKETS)

    def scores(self, ids):
        """Hits of context and candidate over visits of the context, by hash: (B, T, V)."""
        hits = self.hits[(ids[..., None] * 7 + torch.arange(VOCAB)) % BUCKETS]
        return (hits / self.visits[ids % BUCKETS][..., None]).clamp(0.01, 0.99)

    def forward(self, ids):
        return torch.maximum(self.probabilities(ids), self.scores(ids)).log()


def load(root, device):
    return Cache(root)
