"""Two lanes hold the same document: what one is shown next would be the answer for the other.

At the same step it is not here yet. Where one lane is a step behind it is, and has been scored: that is no attack.
"""

from honest import Bettor


class Neighbour(Bettor):
    def guess(self, ids, lane):
        return ids.roll(1)


def load(root, device, lanes=1, count=0):
    return Neighbour(root, lanes)
