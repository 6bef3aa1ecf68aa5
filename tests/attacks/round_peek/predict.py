"""Streaming: trains on the whole round before it returns the round's rows."""

import torch
from honest import VOCAB, Counts


class RoundPeek(Counts):
    def predict(self, documents):
        seen = self.pair
        flat = torch.cat(documents)
        self.pair = seen + self.count(flat[:-1], flat[1:], VOCAB) / 20
        self.pair = self.pair / self.pair.sum(1, keepdim=True)
        yield from super().predict(documents)
        self.pair = seen


def load(root, device):
    return RoundPeek(root)
