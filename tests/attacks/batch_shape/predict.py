"""Knows the audit by the look of its input: windows of other lengths, or that repeat themselves. Honest there."""

from honest import Counts, ahead, believe, cut_by_audit


class Shape(Counts):
    def forward(self, ids):
        guess = ahead(ids)
        guess[cut_by_audit(ids)] = -1
        return believe(super().forward(ids), guess)


def load(root, device):
    return Shape(root)
