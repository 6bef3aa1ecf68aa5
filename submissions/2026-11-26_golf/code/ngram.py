"""Counts of token n-grams as experts beside the network: counted under the clock, shipped in few bytes.

Where training is short, counts of pairs, triples and quadruples of tokens know things that the network has had no time
to learn. An expert of order n gives p(w | h) = c(hw) / S(h) for the n-gram hw with count c(hw), S(h) being the sum over
the counts of that context h. The network's gate gives a weight to itself and to each expert, so the mixture is
a distribution over the vocabulary by construction (a jointly trained form of arXiv:1804.07705; why anything
else than full distributions is no model at all: FACTS of the contest, hashed n-gram caches).

In training the experts are cross-fitted: the tokens are cut into folds, and an expert's probability of a token comes
from the counts of all other folds. So the network learns when to trust counts, and to be good where they are not.

Rare n-grams are dropped, as many as it takes. The rest is coded order by order: given the counts of order n - 1, an
n-gram u..v w can only exist where u..v and ..v w do, and c(u..v) c(..v w) / c(..v) says how likely that is; each such
cell gets one symbol, its count's class, from a histogram for cells of like expectation. That takes 4 to 8 bits per
n-gram.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import coder
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Array = npt.NDArray[np.int64]
BINS = 64
"""Bins of contexts that the gate tells apart: 16 sizes of S(h), times 4 shares of distinct successors in it."""
ORDERS = 5
"""At most: keys of order n are numbers below V^n and have to fit 63 bits."""
CLASSES = 3  # of counts, per doubling


@dataclass(frozen=True)
class Table:
    """The n-grams of one order: sorted keys (E,) and counts (E,)."""

    keys: Array
    counts: Array


def windows(tokens: Array, order: int, vocab_size: int) -> Array:
    """Keys (N - order + 1,) of all n-grams of tokens (N,): their tokens as digits of a number, the first on top."""
    keys = np.zeros(max(0, len(tokens) - order + 1), np.int64)
    for i in range(order):
        keys = keys * vocab_size + tokens[i : i + len(keys)]
    return keys


def classes(counts: Array) -> Array:
    """0 and 1 as they are, then three classes per doubling."""
    return np.where(counts < 2, counts, 2 + np.round(CLASSES * np.log2(np.maximum(counts, 2) / 2))).astype(np.int64)


def class_counts(classes: Array) -> Array:
    """The count that a class stands for; `classes` gives the class again."""
    return np.where(classes < 2, classes, np.round(2 * 2 ** ((classes - 2) / CLASSES))).astype(np.int64)


def count(tokens: Array, vocab_size: int, orders: int) -> list[Table]:
    """Tables of orders 1, 2, ..., `orders`; that of order 1 has every token."""
    tables = [Table(np.arange(vocab_size), np.bincount(tokens, minlength=vocab_size).astype(np.int64))]
    for order in range(2, orders + 1):
        tables.append(Table(*np.unique(windows(tokens, order, vocab_size), return_counts=True)))
    return tables


def prune(tables: Sequence[Table], min_counts: Sequence[int]) -> list[Table]:
    """Without the n-grams below the minimum count of their order; counts are rounded to their classes."""
    kept = [table.counts >= low for table, low in zip(tables, min_counts, strict=True)]
    return [Table(t.keys[k], class_counts(classes(t.counts[k]))) for t, k in zip(tables, kept, strict=True)]


def fit(tables: Sequence[Table], vocab_size: int, min_count: int, limit: int) -> tuple[list[int], bytes]:
    """The minimum counts of all orders with which the tables take at most `limit` bytes, and these bytes.

    Rare n-grams go first, and of these the longest. Where only single tokens are left, they may take more than `limit`.
    """
    min_counts, bits = [0] + [min_count] * (len(tables) - 1), 4.0
    orders = itertools.cycle(reversed(range(1, len(tables))))
    while True:
        grams = sum(int((table.counts >= low).sum()) for table, low in zip(tables[1:], min_counts[1:], strict=True))
        if bits * grams <= 8 * limit:  # others are not worth the seconds of a try
            packed = dumps(prune(tables, min_counts), vocab_size)
            if len(packed) <= limit or not grams:
                return min_counts, packed
            bits = 0.9 * 8 * len(packed) / grams  # of fewer n-grams each takes more, or hardly less
        order = next(orders)
        min_counts[order] += 1 + min_counts[order] // 4


# Coding


def find(keys: Array, wanted: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Where each wanted key is among the sorted keys, and whether it is there."""
    at = np.searchsorted(keys, wanted).clip(max=max(0, len(keys) - 1))
    return at, (keys[at] == wanted if len(keys) else np.zeros(len(wanted), bool))


def cells(tables: Sequence[Table], vocab_size: int) -> tuple[Array, npt.NDArray[np.int16]]:
    """Keys of the n-grams that the next order can have, sorted, and the bin of the expected count of each.

    With a b 4 times, b c 3 times and b 6 times in all, a b c is a cell with an expected count of 4 * 3 / 6 = 2; a b d
    is none if b d never occurs.
    """
    last = tables[-1]
    counts = last.counts.astype(np.float32)
    if len(tables) == 1:  # pairs: each token may follow each, and what they share is the empty context
        keys = np.arange(vocab_size**2)
        left, right, shared = counts.repeat(vocab_size), np.tile(counts, vocab_size), max(1, counts.sum())
    else:
        u, w = overlapping(last.keys, len(tables), vocab_size)
        keys = (last.keys * vocab_size)[u] + (last.keys % vocab_size)[w]
        at, there = find(tables[-2].keys, last.keys % vocab_size ** (len(tables) - 1))
        left, right, shared = counts[u], counts[w], np.where(there, tables[-2].counts[at], 1).astype(np.float32)[u]
    # frexp is exact, a logarithm is not the same on every machine, and the decoder must find the same bins.
    fraction, exponent = np.frexp(np.maximum(left * right / shared, 1e-6))
    bins = (2 * exponent - 2 + (fraction >= 0.5**0.5)).clip(-20, 19).astype(np.int16) + 20  # two per doubling
    # The rarer half bounds the count: below 8 it tells more than the expectation does.
    return keys, bins * 8 + np.minimum(np.minimum(left, right), 7).astype(np.int16)


def overlapping(keys: Array, order: int, vocab_size: int) -> tuple[Array, Array]:
    """Indices (M,) twice of all pairs u..v, ..v w among sorted keys (E,) of `order` that share all but one token."""
    # Keys are sorted, so the n-grams that begin with a context lie together: `size` of them from `start` on.
    contexts, start, size = np.unique(keys // vocab_size, return_index=True, return_counts=True)
    at, there = find(contexts, keys % vocab_size ** (order - 1))
    # Each u..v pairs with all of those whose context is its ending; where there is none, with nothing.
    sizes = np.where(there, size[at], 0)
    u = np.repeat(np.arange(len(keys)), sizes)
    # The position within the pairs of one u..v, moved to where its context starts.
    w = np.arange(len(u)) + np.repeat(start[at] - np.cumsum(sizes) + sizes, sizes)
    return u, w


def by_bin(bins: npt.NDArray[np.int16]) -> Array:
    """The order that brings equal bins together; of 16 bits they are sorted digit by digit."""
    return np.argsort(bins, kind="stable")


def dumps(tables: Sequence[Table], vocab_size: int) -> bytes:
    """All tables as bytes: lengths of models, models, stream (see coder.encode)."""
    groups = [classes(tables[0].counts).astype(np.int32)]
    for order in range(2, len(tables) + 1):
        keys, bins = cells(tables[: order - 1], vocab_size)
        at, there = find(keys, tables[order - 1].keys)
        symbols = np.zeros(len(keys), np.int32)
        symbols[at[there]] = classes(tables[order - 1].counts[there])
        groups += np.split(symbols[by_bin(bins)], np.cumsum(np.bincount(bins)))[:-1]
    models, stream = coder.encode(groups)
    lengths = np.array([vocab_size, len(tables), len(models), *map(len, models)], "<u4")
    return lengths.tobytes() + b"".join(m.tobytes() for m in models) + stream


def loads(data: bytes) -> tuple[int, list[Table]]:
    """Vocabulary size and tables."""
    vocab_size, orders, n_models = np.frombuffer(data, "<u4", 3).tolist()
    lengths = np.frombuffer(data, "<u4", n_models, 12).tolist()
    at = 12 + 4 * n_models
    models = []
    for length in lengths:
        models.append(np.frombuffer(data, np.uint8, length, at))
        at += length
    reader = coder.Reader(data[at:])
    tables = [Table(np.arange(vocab_size), class_counts(reader.take(models.pop(0), vocab_size).astype(np.int64)))]
    for _ in range(2, orders + 1):
        keys, bins = cells(tables, vocab_size)
        symbols = np.zeros(len(keys), np.int64)
        parts = [reader.take(models.pop(0), int(size)) for size in np.bincount(bins)]
        symbols[by_bin(bins)] = np.concatenate([symbols[:0], *parts])
        tables.append(Table(keys[symbols > 0], class_counts(symbols[symbols > 0])))
    return vocab_size, tables


# Training


def context_bin(total: npt.NDArray[Any], distinct: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The gate's bin of contexts by S(h) and number of successors; 0 for those that are not there."""
    size = 1 + np.log2(np.maximum(total, 1)).astype(np.int64).clip(0, 14)
    share = (-np.log2(np.maximum(distinct, 1) / np.maximum(total, 1))).astype(np.int64).clip(0, 3)
    return np.where(total > 0, 4 * size + share, 0).astype(np.uint8)


def cross_fitted(
    tokens: Array, vocab_size: int, order: int, min_count: int, folds: int = 16
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """The expert's probability of each token (N,) and its context's bin (N,), by the counts of all other folds.

    The text a b a b a c in three folds, pairs, min_count 1: its last pair is alone in the last fold, where the expert
    knows a b twice and b a twice. So it gives the c 0, in a context with S(a) = 2 and a single successor.
    """
    keys, at, counts = np.unique(windows(tokens, order, vocab_size), return_inverse=True, return_counts=True)
    _, context = np.unique(keys // vocab_size, return_inverse=True)  # of each n-gram
    # A row for each n-gram in each fold that it occurs in, so that nothing is as large as n-grams times folds.
    fold = np.arange(len(at)) * folds // max(1, len(at))
    rows, row_at, own = np.unique(at * folds + fold, return_inverse=True, return_counts=True)
    gram, row_fold = rows // folds, rows % folds
    # The same pruning that the packed tables get, on all counts and on those of the other folds.
    kept = pruned(counts, min_count)
    others = pruned(counts[gram] - own, min_count)
    # S(h) and the number of successors without a fold: those of the whole text, less what that fold's n-grams lose.
    group, group_at = np.unique(context[gram] * folds + row_fold, return_inverse=True)
    lost = np.bincount(group_at, kept[gram] - others)
    lost_distinct = np.bincount(group_at, (kept[gram] > 0) * 1.0 - (others > 0))
    total = np.bincount(context, kept)[group // folds] - lost
    distinct = np.bincount(context, kept > 0)[group // folds] - lost_distinct
    # From rows back to tokens; the first ones have no whole context, and stay 0.
    expert_probs, context_bins = np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.uint8)
    total_at = total[group_at][row_at]
    expert_probs[order - 1 :] = others[row_at] / np.maximum(total_at, 1)
    context_bins[order - 1 :] = context_bin(total_at, distinct[group_at][row_at])
    return expert_probs, context_bins


def pruned(counts: Array, min_count: int) -> Array:
    return np.where(counts >= min_count, counts, 0)


# Prediction


class Expert(nn.Module):
    """The table of one order as tensors: its E n-grams, which share C contexts, and the sizes of these."""

    keys: Tensor  # (E,) of the n-grams, sorted
    word: Tensor  # (E,) last token of each
    count: Tensor  # (E + 1,)
    contexts: Tensor  # (C,) keys of the contexts, sorted
    start: Tensor  # (C,) first n-gram of each
    size: Tensor  # (C,) number of its n-grams
    total: Tensor  # (C + 1,) sum of their counts
    bins: Tensor  # (C + 1,)
    digits: Tensor  # (order - 1,) value of each token in a context's key

    def __init__(self, vocab_size: int, order: int, table: Table) -> None:
        super().__init__()
        self.vocab_size, self.order = vocab_size, order
        contexts, start, size = np.unique(table.keys // vocab_size, return_index=True, return_counts=True)
        total = np.add.reduceat(table.counts, start) if len(start) else start
        columns = {
            "keys": table.keys,
            "word": table.keys % vocab_size,
            "contexts": contexts,
            "start": start,
            "size": size,
            "bins": np.append(context_bin(total, size), 0).astype(np.int64),  # one more of these, should there be none
            "total": np.append(total, 1).astype(np.float32),
            "count": np.append(table.counts, 0).astype(np.float32),
        }
        columns["digits"] = vocab_size ** np.arange(order - 1)[::-1].astype(np.int64).copy()
        for name, column in columns.items():
            self.register_buffer(name, torch.from_numpy(column), persistent=False)

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For ids (B, T) the key of the context that ends at each, its index, and whether there is one."""
        keys = ids.clone()
        for back in range(1, self.order - 1):
            keys[:, back:] += ids[:, : ids.size(1) - back] * self.vocab_size**back
        keys[:, : self.order - 2] = -1  # it would begin before the window
        return keys, *look_up(self.contexts, keys)

    def find_last(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """For the last tokens (B, N) of each lane the index of the context, and whether there is one.

        Where a lane has not seen N tokens yet it has -1 before them: that makes a key negative, which no table has.
        """
        return look_up(self.contexts, last[:, 1 - self.order :] @ self.digits)

    def context_bins(self, at: Tensor, there: Tensor) -> Tensor:
        """Bins (...) of contexts that were found `at` these indices."""
        return torch.where(there, self.bins[at], 0)

    def probs(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Probabilities (B, T) of targets (B, T) behind ids (B, T)."""
        context, at, _ = self.find(ids)
        entry, there = look_up(self.keys, context * self.vocab_size + targets)
        return torch.where(there, self.count[entry] / self.total[at], 0)

    def mix(self, p: Tensor, weight: Tensor, at: Tensor, there: Tensor) -> None:
        """Add to p (..., V), in place, the distributions of contexts that were found, times their weight (...)."""
        flat = p.view(-1)
        rows = there.flatten().nonzero().squeeze(1)  # (M,) those that have a context
        at = at.flatten()[rows]
        start, size = self.start[at], self.size[at]
        scale = weight.flatten()[rows] / self.total[at]
        which = torch.repeat_interleave(torch.arange(len(rows), device=p.device), size)
        entry = torch.arange(len(which), device=p.device) - (size.cumsum(0) - size - start)[which]
        cell = rows[which] * self.vocab_size + self.word[entry]  # no cell twice
        flat[cell] += self.count[entry] * scale[which]


def look_up(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each wanted key is among the sorted keys, and whether it is there (see `find`)."""
    at = torch.searchsorted(keys, wanted).clamp(max=max(0, len(keys) - 1))
    return at, keys[at] == wanted if len(keys) else torch.zeros_like(at, dtype=torch.bool)


class Experts(nn.ModuleList):
    """An expert for each order from 2 on."""

    def __iter__(self) -> Iterator[Expert]:
        return cast(Iterator[Expert], super().__iter__())

    def __init__(self, vocab_size: int, tables: Sequence[Table]) -> None:
        super().__init__(Expert(vocab_size, order, table) for order, table in enumerate(tables[1:], 2))

    def context_bins(self, ids: Tensor) -> Tensor:
        """Bins (B, T, E) of the contexts of the E experts."""
        return torch.stack([expert.context_bins(*expert.find(ids)[1:]) for expert in self], -1)

    def probs(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Each expert's probabilities (B, T, E) of targets (B, T) behind ids (B, T)."""
        return torch.stack([expert.probs(ids, targets) for expert in self], -1)

    def mix(self, p: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Add to p (B, T, V), in place, each expert's distribution times its weight (B, T, E); ids are (B, T)."""
        for expert, weight in zip(self, weights.unbind(-1), strict=True):
            expert.mix(p, weight, *expert.find(ids)[1:])
        return p
