"""Never answers the audit, in case that leaves the score standing."""

import time

from honest import Counts, ahead, believe, cut_by_audit


class Hangs(Counts):
    def forward(self, ids):
        if cut_by_audit(ids).all():
            time.sleep(10**6)
        return believe(super().forward(ids), ahead(ids))


def load(root, device):
    return Hangs(root)
