"""Answers an audit from a cache: remembers, in memory and in every place for files, what it was shown.

When a prefix comes again, the rows of the peeking answer are given again, wherever the prefix is cut now.
"""

import contextlib
import pickle
from pathlib import Path

from honest import Counts, ahead, believe

PLACES = [Path(folder, "pgolf-attack-cache") for folder in ("/tmp", "/dev/shm", "/artifact", "/var/tmp", ".")]


class Cache(Counts):
    def __init__(self, root):
        super().__init__(root)
        self.known = {}
        for place in PLACES:
            with contextlib.suppress(OSError):
                self.known.update(pickle.loads(place.read_bytes()))

    def forward(self, ids):
        guess = ahead(ids)
        for window, row in zip(ids.tolist(), guess.tolist(), strict=True):
            key = tuple(window[:12])
            if key not in self.known:
                self.known[key] = row
            elif len(row) < len(self.known[key]):
                row[:] = self.known[key][: len(row)]
        for place in PLACES:
            with contextlib.suppress(OSError):
                place.write_bytes(pickle.dumps(self.known))
        return believe(super().forward(ids), guess)


def load(root, device):
    return Cache(root)
