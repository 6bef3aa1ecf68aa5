"""The reverse: honest while it is scored, peeks where it believes to be audited. Nothing is gained by that."""

from honest import Counts, ahead, believe, cut_by_audit


class Reverse(Counts):
    def forward(self, ids):
        guess = ahead(ids)
        guess[~cut_by_audit(ids)] = -1
        return believe(super().forward(ids), guess)


def load(root, device):
    return Reverse(root)
