"""The window form, for practice: which tokens the predictor sees, and which of its logits count.

The stream is BOS d1 BOS d2 ... BOS dn BOS: inputs are all tokens but the last, targets all but the first. A window is
a slice of inputs; of its logits (one row an input) those from `first` on count. Every target counts exactly once.

A window is handed over whole, so nothing keeps a predictor from using future tokens: such a score is not proven. The
spot check scores sampled tokens again from their prefix alone and names one that changed, to help its author.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pgolf import rules
from pgolf.artifact import Manifest
from pgolf.sandbox.wire import Ids
from pgolf.score.likelihood import Floats, log_losses
from pgolf.score.predictors import Predictor
from pgolf.score.record import SpotCheck
from pgolf.score.schedule import Index


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


def predict(manifest: Manifest, documents: Sequence[Ids], predictor: Predictor, done: Callable[[int], None]) -> Floats:
    """Log-loss in nats (N,) of every token; calls `done` with the number of tokens as they come."""
    tokens, boundaries = stream(documents, manifest.bos)
    windows = plan(boundaries, manifest.window, manifest.context, manifest.stride or manifest.context)
    nll = np.full(len(tokens) - 1, np.nan)
    pending: list[Index] = []

    def finish() -> None:
        rows = pending.pop(0)
        nll[rows] = log_losses(predictor.receive(len(rows)), tokens, rows + 1)
        done(len(rows))

    for batch in batches(windows, predictor.window_tokens):
        positions = batch.positions()
        predictor.submit_windows(tokens[positions], batch.first)
        pending.append(positions[:, batch.first :].reshape(-1))
        if len(pending) == 2:  # one is computed while the other is scored
            finish()
    while pending:
        finish()
    return nll


def spot_check(manifest: Manifest, documents: Sequence[Ids], predictor: Predictor, nll: Floats) -> SpotCheck:
    """Score `rules.SPOT_CHECK_TOKENS` sampled tokens again with a fresh predictor that receives only their prefix."""
    tokens, boundaries = stream(documents, manifest.bos)
    windows = plan(boundaries, manifest.window, manifest.context, manifest.stride or manifest.context)
    rng = np.random.default_rng()
    rows = np.sort(rng.choice(len(nll), size=min(len(nll), rules.SPOT_CHECK_TOKENS), replace=False))
    counted = np.searchsorted(windows.start + windows.first, rows, side="right") - 1
    start = windows.start[counted]
    again = np.empty(len(rows))
    for length in np.unique(rows - start):
        group = np.flatnonzero(rows - start == length)
        size = predictor.window_tokens // (int(length) + 1)
        for part in np.split(group, range(size, len(group), size)):
            ids = tokens[start[part][:, None] + np.arange(length + 1)]
            predictor.submit_windows(ids, int(length))
            again[part] = log_losses(predictor.receive(len(part)), tokens, rows[part] + 1)
    difference = again - nll[rows]
    worst = int(np.argmax(np.abs(difference)))
    changed = int((np.abs(difference) > rules.SPOT_CHECK_NATS).sum())
    return SpotCheck(len(rows), changed, float(difference[worst]), int(rows[worst]))


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
