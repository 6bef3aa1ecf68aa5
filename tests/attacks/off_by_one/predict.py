"""Shift by one too few: row t looks at token t + 1, which is the one to be predicted."""

from honest import Counts, ahead, believe


class OffByOne(Counts):
    def forward(self, ids):
        return believe(super().forward(ids), ahead(ids))


def load(root, device):
    return OffByOne(root)
