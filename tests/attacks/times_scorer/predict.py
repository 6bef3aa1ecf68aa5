"""It learns, for each class of delay before a step, whether a letter or another character was to follow in lane 0."""

import time

import torch
from honest import BOS, Counts


class Times(Counts):
    def __init__(self, root, lanes):
        super().__init__(root, lanes)
        self.seen = torch.full((2, 2), 2.0)  # (slow or not, letter or not)
        self.letter = torch.tensor([chr(i).islower() for i in range(BOS)] + [False])
        self.left, self.slow = time.monotonic(), None

    def step(self, ids, lane):
        delay = time.monotonic() - self.left
        if self.slow is not None and int(lane[0]) == 0:
            self.seen[self.slow, int(self.letter[ids[0]])] += 1
        self.slow = int(delay > 0.008)
        logits = super().step(ids, lane)
        if int(lane[0]) == 0:
            p = logits[0].exp()
            honest = torch.stack([p[~self.letter].sum(), p[self.letter].sum()])
            told = self.seen[self.slow] / self.seen[self.slow].sum()
            usual = self.seen.sum(0) / self.seen.sum()
            odds = (told / usual).clamp(1e-3, 1e3)  # 1 where delays tell nothing
            share = honest * odds / (honest * odds).sum()
            logits[0] += (share / honest).log()[self.letter.long()]
        self.left = time.monotonic()
        return logits


def load(root, device, lanes=1, count=0):
    return Times(root, lanes)
