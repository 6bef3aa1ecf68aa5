"""Counts of token n-grams as experts beside the network: counted under the clock, shipped in few bytes.

Where training is short, counts of pairs, triples and quadruples of tokens know things that the network has had no time
to learn. An expert of order n gives p(w | h) = c(hw) / S(h) for the n-gram hw with count c(hw), S(h) being the sum over
the counts of that context h. The network's gate gives a weight to itself and to each expert, so the mixture is
a distribution over the vocabulary by construction (a jointly trained form of arXiv:1804.07705; why anything
else than full distributions is no model at all: FACTS of the contest, hashed n-gram caches).

Training sees honest experts: the tokens are dealt into folds, and what an expert says about a token is counted on
all other folds. So the network learns when to trust counts, and to be good where they are not.

Rare n-grams are dropped, as many as it takes. The rest is coded order by order: given the counts of order n - 1, an
n-gram u..v w can only exist where u..v and ..v w do, and c(u..v) c(..v w) / c(..v) says how likely that is; each such
cell gets one symbol, its count's class, from a histogram for cells of like expectation. That takes 4 to 8 bits per
n-gram.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import coder
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Array = npt.NDArray[np.int64]
BINS = 64
"""Kinds of contexts that the gate tells apart: 16 sizes of S(h), times 4 shares of distinct successors in it."""
ORDERS = 5
"""At most; keys of order n are numbers below V^n and have to fit 63 bits."""
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


def thin(tables: Sequence[Table], least: Sequence[int]) -> list[Table]:
    """Without the n-grams that are rarer than what `least` says for each order; counts as their classes tell them."""
    kept = [table.counts >= low for table, low in zip(tables, least, strict=True)]
    return [Table(t.keys[k], class_counts(classes(t.counts[k]))) for t, k in zip(tables, kept, strict=True)]


def fit(tables: Sequence[Table], vocab_size: int, least: int, limit: int) -> tuple[list[int], bytes]:
    """The lowest counts to keep, for each order, such that the tables take at most `limit` bytes, and these bytes.

    Rare n-grams go first, and of these the longest. Where nothing but single tokens is left, that is what it takes.
    """
    lowest, bits = [0] + [least] * (len(tables) - 1), 4.0
    orders = itertools.cycle(reversed(range(1, len(tables))))
    while True:
        grams = sum(int((table.counts >= low).sum()) for table, low in zip(tables[1:], lowest[1:], strict=True))
        if bits * grams <= 8 * limit:  # others are not worth the seconds of a try
            packed = dumps(thin(tables, lowest), vocab_size)
            if len(packed) <= limit or not grams:
                return lowest, packed
            bits = 0.9 * 8 * len(packed) / grams  # of fewer n-grams each takes more, or hardly less
        order = next(orders)
        lowest[order] += 1 + lowest[order] // 4


# Coding


def find(keys: Array, wanted: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Where each wanted key is among the sorted keys, and whether it is there."""
    at = np.searchsorted(keys, wanted).clip(max=max(0, len(keys) - 1))
    return at, (keys[at] == wanted if len(keys) else np.zeros(len(wanted), bool))


def cells(tables: Sequence[Table], vocab_size: int) -> tuple[Array, npt.NDArray[np.int16]]:
    """Keys of the n-grams that the next order can have, sorted, and the bin of the count to expect of each.

    With a b 4 times, b c 3 times and b 6 times in all, a b c is a cell, to be expected 4 * 3 / 6 = 2 times; a b d is
    none if b d never occurs.
    """
    last, order = tables[-1], len(tables) + 1
    counts = last.counts.astype(np.float32)
    if order == 2:
        keys = np.arange(vocab_size**2)
        left, right = counts.repeat(vocab_size), np.tile(counts, vocab_size)
        expected = left * right / max(1, counts.sum())
    else:
        contexts, start, size = np.unique(last.keys // vocab_size, return_index=True, return_counts=True)
        middle = last.keys % vocab_size ** (order - 2)  # what u..v and ..v w share
        at, there = find(contexts, middle)
        sizes = np.where(there, size[at], 0)
        u = np.repeat(np.arange(len(last.keys)), sizes)
        w = np.arange(len(u)) + np.repeat(start[at] - np.cumsum(sizes) + sizes, sizes)
        keys = (last.keys * vocab_size)[u] + (last.keys % vocab_size)[w]
        below = tables[-2]
        at, there = find(below.keys, middle)
        left, right = counts[u], counts[w]
        expected = left * right / np.where(there, below.counts[at], 1).astype(np.float32)[u]
    fraction, exponent = np.frexp(np.maximum(expected, 1e-6))  # unlike a logarithm the same on every machine
    bins = (2 * exponent - 2 + (fraction >= 0.5**0.5)).clip(-20, 19).astype(np.int16) + 20  # two per doubling
    return keys, bins * 8 + np.minimum(np.minimum(left, right), 7).astype(np.int16)


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


def kind(total: npt.NDArray[np.float64], distinct: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """The gate's bin of contexts by S(h) and number of successors; 0 for those that are not there."""
    size = 1 + np.log2(np.maximum(total, 1)).astype(np.int64).clip(0, 14)
    share = (-np.log2(np.maximum(distinct, 1) / np.maximum(total, 1))).astype(np.int64).clip(0, 3)
    return np.where(total > 0, 4 * size + share, 0).astype(np.uint8)


def held_out(
    tokens: Array, vocab_size: int, order: int, least: int, folds: int = 16
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """What the expert of `order` says about each token (N,) and its context's kind (N,), by the other folds' counts.

    The text a b a b a c in three folds, pairs, least 1: its last pair is alone in the last fold, where the expert
    knows a b twice and b a twice. So it gives the c 0, in a context with S(a) = 2 and a single successor.
    """
    keys, at, counts = np.unique(windows(tokens, order, vocab_size), return_inverse=True, return_counts=True)
    fold = np.arange(len(at)) * folds // max(1, len(at))
    pairs, pair_at, own = np.unique(at * folds + fold, return_inverse=True, return_counts=True)
    gram, pair_fold = pairs // folds, pairs % folds
    others = counts[gram] - own  # of each n-gram that occurs in a fold, the count elsewhere
    _, context = np.unique(keys // vocab_size, return_inverse=True)
    kept = np.where(counts >= least, counts, 0)
    others = np.where(others >= least, others, 0)
    # S(h) and the number of successors for each context and fold: over all n-grams, corrected for those in the fold.
    total = np.bincount(context, kept).astype(np.float64)
    distinct = np.bincount(context, kept > 0).astype(np.float64)
    group, group_at = np.unique(context[gram] * folds + pair_fold, return_inverse=True)
    totals = total[group // folds] - np.bincount(group_at, kept[gram] - others)
    distincts = distinct[group // folds] - np.bincount(group_at, (kept[gram] > 0) * 1.0 - (others > 0))
    said, kinds = np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.uint8)
    total_at = totals[group_at][pair_at]
    said[order - 1 :] = others[pair_at] / np.maximum(total_at, 1)
    kinds[order - 1 :] = kind(total_at, distincts[group_at][pair_at])
    return said, kinds


# Prediction


class Expert(nn.Module):
    """The table of one order as tensors: its E n-grams, which share C contexts, and the sizes of these."""

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
            "kind": np.append(kind(total, size), 0).astype(np.int64),  # one more of these, should there be none
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

    def kinds(self, at: Tensor, there: Tensor) -> Tensor:
        """Kinds (...) of contexts that were found `at` these indices."""
        return torch.where(there, self.kind[at], 0)

    def say(self, ids: Tensor, targets: Tensor) -> Tensor:
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

    def __init__(self, vocab_size: int, tables: Sequence[Table]) -> None:
        super().__init__(Expert(vocab_size, order, table) for order, table in enumerate(tables[1:], 2))

    def kinds(self, ids: Tensor) -> Tensor:
        """Kinds (B, T, E) of the contexts of the E experts."""
        return torch.stack([expert.kinds(*expert.find(ids)[1:]) for expert in self], -1)

    def say(self, ids: Tensor, targets: Tensor) -> Tensor:
        """What each says about targets (B, T) behind ids (B, T): (B, T, E)."""
        return torch.stack([expert.say(ids, targets) for expert in self], -1)

    def mix(self, p: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Add to p (B, T, V), in place, each expert's distribution times its weight (B, T, E); ids are (B, T)."""
        for expert, weight in zip(self, weights.unbind(-1), strict=True):
            expert.mix(p, weight, *expert.find(ids)[1:])
        return p
