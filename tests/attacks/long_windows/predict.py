"""One window for a large part of the text, late in which the audit can afford next to no samples."""

import torch
from honest import Counts, ahead, believe


class Long(Counts):
    def forward(self, ids):
        late = torch.arange(ids.shape[1]) % 10 == 9
        late[: ids.shape[1] // 2] = False
        return believe(super().forward(ids), torch.where(late, ahead(ids), -1))


def load(root, device):
    return Long(root)
