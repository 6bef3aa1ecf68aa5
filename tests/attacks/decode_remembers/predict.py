import torch


class Counting:
    following = 1

    def step(self, ids, lane):
        begins = ids == 1
        numbers = torch.where(begins, self.following + begins.cumsum(0), 1).clamp(max=4095)
        self.following += int(begins.sum())
        return 20.0 * torch.nn.functional.one_hot(numbers, 4096).float()


def load(root, device, lanes, count):
    return Counting()
