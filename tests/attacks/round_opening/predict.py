"""Streaming: a document that opens a round did not fit into the rest of the one before, so it is longer than that.

Rounds end where they are full, whatever the text; this gains where they hold whole documents.
"""

from honest import BOS, Counts

ROUND = 2048


class Opening(Counts):
    room = 0

    def predict(self, documents):
        for number, document in enumerate(documents):
            rows = self(document[None])[0]
            if number == 0 and document[0] == BOS:
                rows[: self.room, BOS] = -40.0
            yield rows

    def update(self, documents):
        self.room = ROUND - sum(map(len, documents))


def load(root, device):
    return Opening(root)
