"""Which tokens the predictor sees, and which of its rows count.

The stream is BOS d1 BOS d2 ... BOS dn BOS: inputs are all tokens but the last, targets all but the first, so
each document costs its own ids and one BOS that ends it. A window is a slice of inputs; of its rows (one per
input) those from `first` on count. Every target counts exactly once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt

from pgolf.artifact import Manifest

Ids = npt.NDArray[np.int32]
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """W windows over a stream: arrays (W,) of first input, number of inputs, first row that counts."""

    start: Index
    length: Index
    first: Index


@dataclass(frozen=True)
class Batch:
    """B windows of the same length and `first`: `start` (B,) in the stream."""

    start: Index
    length: int
    first: int

    def positions(self) -> Index:
        """Stream positions (B, length) of the inputs; a row's target is one further."""
        return self.start[:, None] + np.arange(self.length)


@dataclass(frozen=True)
class Plan:
    """What is scored, and how it is shown to the predictor."""

    stream: Ids
    """(N + 1,): BOS d1 BOS d2 ... BOS dn BOS; every token but the first is scored."""
    rounds: tuple[Windows, ...]
    """Streaming form: the pieces of each round. Simple form: one entry, all windows."""

    @staticmethod
    def make(manifest: Manifest, documents: Sequence[Ids]) -> "Plan":
        """The plan that the manifest asks for, for documents of ids (n,)."""
        tokens, boundaries = stream(documents, manifest.bos)
        if manifest.form == "streaming":
            return Plan(tokens, tuple(rounds(boundaries, manifest.round)))
        stride = manifest.stride or manifest.context
        return Plan(tokens, (plan(boundaries, manifest.window, manifest.context, stride),))

    @staticmethod
    def separate(manifest: Manifest, documents: Sequence[Ids]) -> "Plan":
        """The same with each document by itself: windows begin with it, and a round holds only one.

        So the tokens that are shown for a row, and the rounds before it, follow from the tokens before it: a decoder,
        which learns the length of a document at its end, can keep to this plan.
        """
        tokens, boundaries = stream(documents, manifest.bos)
        if manifest.form == "streaming":
            own = (rounds(np.array(edges), manifest.round) for edges in pairwise(boundaries))
            return Plan(tokens, tuple(chain.from_iterable(own)))
        stride = manifest.stride or manifest.context
        return Plan(tokens, (plan(boundaries, "document", manifest.context, stride),))

    def windows(self) -> Windows:
        """All windows, or the pieces of all rounds."""
        columns = ((r.start, r.length, r.first) for r in self.rounds)
        return Windows(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    def show(self, number: int) -> list[Ids]:
        """The tokens of each piece of a round."""
        pieces = self.rounds[number]
        return [self.stream[s : s + n] for s, n in zip(pieces.start.tolist(), pieces.length.tolist(), strict=True)]


def stream(documents: Sequence[Ids], bos: int) -> tuple[Ids, Index]:
    """The stream (N + 1,) and the positions (D + 1,) of its BOS tokens."""
    lengths = np.array([len(ids) + 1 for ids in documents], dtype=np.int64)
    boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.full(boundaries[-1] + 1, bos, dtype=np.int32)
    for ids, start in zip(documents, boundaries, strict=False):
        tokens[start + 1 : start + 1 + len(ids)] = ids
    return tokens, boundaries


def plan(boundaries: Index, mode: str, context: int, stride: int) -> Windows:
    """Windows of at most `context` inputs over the whole stream ("packed") or over each document ("document").

    The first window of a segment counts all its rows. Each further one starts `stride` later and counts the
    rows that reach beyond its predecessor, so they see at least `context` - `stride` tokens before them.
    """
    segments = pairwise(boundaries if mode == "document" else boundaries[[0, -1]])
    parts = [_plan_segment(int(begin), int(end), context, stride) for begin, end in segments]
    return Windows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _plan_segment(begin: int, end: int, context: int, stride: int) -> tuple[Index, Index, Index]:
    further = max(0, -(-(end - begin - context) // stride))
    start = begin + stride * np.arange(further + 1, dtype=np.int64)
    stop = np.minimum(start + context, end)
    first = np.concatenate([[0], stop[:-1] - start[1:]]).astype(np.int64)
    return start, stop - start, first


def window_start(row: int, context: int, stride: int) -> int:
    """Where the window starts whose row `row` counts; both from the segment's start (see `plan`)."""
    return stride * max(0, -(-(row + 1 - context) // stride))


def rounds(boundaries: Index, most: int) -> list[Windows]:
    """The stream in rounds of `most` inputs, the last one of what is left, whatever documents are cut by that.

    So where a round ends tells nothing of the text. A round is the pieces of documents that it shows, as windows all
    of whose rows count. A piece that does not begin with BOS continues the last one of the round before.
    """
    begin, end = int(boundaries[0]), int(boundaries[-1])
    edges = np.union1d(boundaries, np.arange(begin, end, most))
    start, length = edges[:-1], np.diff(edges)
    cuts = np.flatnonzero(np.diff((start - begin) // most)) + 1
    pairs = zip(np.split(start, cuts), np.split(length, cuts), strict=True)
    return [Windows(s, n, np.zeros_like(s)) for s, n in pairs]


def batches(windows: Windows, most_inputs: int) -> Iterator[Batch]:
    """Group windows of equal length and `first`, at most `most_inputs` inputs together (at least one window)."""
    order = np.lexsort((windows.start, windows.first, windows.length))
    keys = np.stack([windows.length[order], windows.first[order]])
    edges = np.flatnonzero(np.any(keys[:, 1:] != keys[:, :-1], axis=0)) + 1
    for group in np.split(order, edges):
        length, first = int(windows.length[group[0]]), int(windows.first[group[0]])
        size = max(1, most_inputs // length)
        for at in range(0, len(group), size):
            yield Batch(windows.start[group[at : at + size]], length, first)
