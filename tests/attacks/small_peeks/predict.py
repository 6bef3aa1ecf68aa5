"""A little everywhere: every true token gets slightly more, far less than what counts as an outlier."""

from honest import Counts, ahead, believe


class Small(Counts):
    def forward(self, ids):
        return believe(super().forward(ids), ahead(ids), 0.0005)


def load(root, device):
    return Small(root)
