import torch


class Uniform:
    def step(self, ids, lane):
        return torch.zeros(len(ids), 1 << 14)


def load(root, device, lanes, count):
    return Uniform()
