import torch
from honest import BOS, Counts


class LaneEnd(Counts):
    def __init__(self, root, lanes):
        super().__init__(root, lanes)
        self.ends = torch.tensor([[1.0, 500.0]] * 8)  # by what happened: ends and others
        self.happened, self.active = None, lanes

    def step(self, ids, lane):
        if self.happened is not None:
            self.ends[self.happened, 0] += float((ids == BOS).sum()) + self.active - len(lane)
            self.ends[self.happened, 1] += float((ids != BOS).sum())
        fewer, refilled, last = len(lane) < self.active, bool((ids == BOS).any()), len(lane) == 1
        self.happened, self.active = 4 * fewer + 2 * refilled + last, len(lane)
        end = self.ends[self.happened, 0] / self.ends[self.happened].sum()
        usual = self.ends[:, 0].sum() / self.ends.sum()
        logits = super().step(ids, lane)
        logits[:, BOS] += (end / usual).log()
        return logits


def load(root, device, lanes=1, count=0):
    return LaneEnd(root, lanes)
