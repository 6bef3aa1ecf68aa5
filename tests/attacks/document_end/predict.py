"""Streaming: a document is shown whole, so its length tells where the end token is due."""

import torch
from honest import BOS, Counts, believe


class End(Counts):
    def predict(self, documents):
        for document in documents:
            guess = torch.full_like(document, -1)
            guess[-1] = BOS
            yield believe(self(document[None])[0], guess, 0.999)


def load(root, device):
    return End(root)
