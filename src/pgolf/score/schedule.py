"""The schedule of the step form: which lane is shown which token when. Scorer, compressor and decoder share it.

In each step every active lane shows one token, the predictor returns logits of the next one, and only then are the
true next tokens shown. So a step depends on scored tokens, the number of documents or tokens, and the manifest alone.
"""

import heapq
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pgolf.artifact import Manifest
from pgolf.sandbox.wire import Ids

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """What B active lanes show."""

    lane: Ids
    """(B,), ascending."""
    shown: Ids
    """(B,) one token for each."""
    segment: Index
    """(B,) the document or part that the lane is in."""
    offset: Index
    """(B,) how many tokens of it are known: the next one is to be predicted."""


Walk = Generator[Step, Ids, None]


def steps(manifest: Manifest, count: int) -> Walk:
    """Yield each step; is sent the tokens (B,) that follow. `count`: documents, or tokens in the layout "parts"."""
    parts = manifest.layout == "parts"
    sizes = part_sizes(count, manifest.lanes) if parts else np.zeros(0, dtype=np.int64)
    lane = np.flatnonzero(sizes) if parts else np.arange(min(manifest.lanes, count))
    segment, offset = lane.copy(), np.zeros_like(lane)
    shown = np.full(len(lane), manifest.bos, dtype=np.int32)
    waiting = count if parts else len(lane)  # the next document that no lane has begun
    while len(lane):
        following = yield Step(lane.astype(np.int32), shown, segment, offset)
        offset, shown = offset + 1, following
        ended = offset == sizes[segment] if parts else following == manifest.bos
        if ended.any():
            refilled = np.flatnonzero(ended)[: max(0, count - waiting)]
            segment = segment.copy()
            segment[refilled] = waiting + np.arange(len(refilled))
            waiting += len(refilled)
            offset[refilled] = 0
            ended[refilled] = False  # a lane that takes the next document shows BOS, which has just ended the last one
            lane, segment, offset, shown = (array[~ended] for array in (lane, segment, offset, shown))


def begin(walk: Walk) -> Step | None:
    """The first step."""
    return next(walk, None)


def advance(walk: Walk, following: Ids) -> Step | None:
    """The next step once the tokens (B,) that follow are known; None when there is none."""
    try:
        return walk.send(following)
    except StopIteration:
        return None


def part_sizes(tokens: int, lanes: int) -> Index:
    """Tokens (lanes,) of each part of the layout "parts": equal but for one."""
    return tokens // lanes + (np.arange(lanes) < tokens % lanes).astype(np.int64)


def length(manifest: Manifest, documents: Sequence[int]) -> int:
    """How many steps there are for documents of that many tokens, BOS included."""
    if manifest.layout == "parts":
        return int(part_sizes(sum(documents), manifest.lanes).max())
    ends = sorted(documents[: manifest.lanes])  # a heap: the step after the last one of each lane
    for tokens in documents[manifest.lanes :]:
        heapq.heapreplace(ends, ends[0] + tokens)
    return max(ends, default=0)


@dataclass(frozen=True)
class Targets:
    """What is to be predicted: d1 BOS d2 BOS ... dn BOS, in segments."""

    tokens: Ids
    """(N,) each scored once."""
    starts: Index
    """(S,) where each document or part begins."""

    @staticmethod
    def of(manifest: Manifest, documents: Sequence[Ids]) -> "Targets":
        """For documents of ids (n,), in the manifest's layout."""
        tokens = np.concatenate([np.append(ids, manifest.bos) for ids in documents]).astype(np.int32)
        lengths = np.array([len(ids) + 1 for ids in documents], dtype=np.int64)
        if manifest.layout == "parts":
            lengths = part_sizes(len(tokens), manifest.lanes)
        return Targets(tokens, np.cumsum(lengths) - lengths)

    def at(self, step: Step) -> Index:
        """Where in `tokens` each token (B,) stands that follows."""
        return self.starts[step.segment] + step.offset


def count(manifest: Manifest, documents: int, tokens: int) -> int:
    """The one number about the text that `load` receives: documents, or tokens in the layout "parts"."""
    return tokens if manifest.layout == "parts" else documents
