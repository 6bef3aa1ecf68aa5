"""The reverse: peeks in its first calls only, and is honest afterwards, in case the audit comes late."""

from honest import Counts, ahead, believe


class Early(Counts):
    calls = 0

    def forward(self, ids):
        self.calls += 1
        logits = super().forward(ids)
        return believe(logits, ahead(ids)) if self.calls <= 2 else logits


def load(root, device):
    return Early(root)
