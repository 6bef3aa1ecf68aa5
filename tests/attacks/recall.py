"""What an attack does with a text that it got hold of: it looks its windows up there. A member of such artifacts."""

import torch
from honest import Counts, believe


class Recall(Counts):
    """Predicts by the stolen text (bytes) where it knows the last bytes."""

    length = 8

    def __init__(self, root, stolen):
        super().__init__(root)
        self.next = {stolen[at - self.length : at]: stolen[at] for at in range(self.length, len(stolen))}

    def forward(self, ids):
        rows = [bytes(i for i in window if i < 256) if self.next else b"" for window in ids.tolist()]
        guess = torch.full_like(ids, -1)
        for number, (row, window) in enumerate(zip(rows, ids.tolist(), strict=True)):
            done = 0
            for place, token in enumerate(window):
                done += token < 256
                guess[number, place] = self.next.get(row[max(0, done - self.length) : done], -1)
        return believe(super().forward(ids), guess)
