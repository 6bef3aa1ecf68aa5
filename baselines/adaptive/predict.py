"""A streaming predictor around a trained model: what it has read so far corrects what the model says.

The distribution of the next token w is a log-linear mixture, normalised over the whole vocabulary by the scorer's
softmax like any other row of logits:

    log p(w) = a * model(w) + b * log ngram(w) + sum over n of c_n * log(1 + times_n(w) / (K_n * ngram(w))) + constant

- model: the simple form's logits, in windows inside each document; naive.py is the trained artifact's own predict.py.
- ngram: interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999, equation 24) over the rounds before.
- times_n: how often w followed the last n tokens earlier in this very document. A cache (Kuhn and De Mori 1990) whose
  counts enter as the ratio of (times + K * ngram) to K * ngram, like unigram rescaling (Kneser, Peters, Klakow 1997).
- the weights a, b, c_1, ...: fitted to a sample of each round once that was scored, by Newton steps on its code length.

`predict` only reads; all learning is in `update`. A row depends on what `update` saw and on its own document's prefix.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import naive
import torch
from torch import Tensor, nn

ORDER = 3  # tokens of context that the counts look at
DISCOUNT = 0.75  # taken off every count, for words not seen in the context
MOST_KEYS = 1 << 21  # per order; then the counts are halved and those below 1 forgotten
CACHE = ((64, 3.0), (32, 1.0), (16, 0.5))  # for n = 1, 2, 3: most recent occurrences that count, and K_n
WEIGHTS = (0.8, 0.2, 0.3, 0.3, 0.2)  # to begin with
CAUTION = 300.0  # curvature that the first weights are worth: that of about a hundred tokens
MEMORY = 0.98  # of the curvature, from round to round
SAMPLE = 64  # one window in so many, drawn by chance, is used for fitting
LONGEST = 1 << 15  # tokens of a document that are looked back at when it goes on in the next round
BLOCK = 1024  # rows that are mixed at once, so that they stay in the cache

Piece = tuple[Tensor, int]
"""Tokens (n,) from the start of a document, and the first row that is asked for."""


def load(root: Path, device: torch.device) -> "Predictor":
    """The predictor of the packed artifact."""
    manifest = json.loads((root / "submission.json").read_text(encoding="utf-8"))
    return Predictor(naive.load(root, device), manifest["bos"], device)


class Predictor:
    def __init__(self, model: nn.Module, bos: int, device: torch.device) -> None:
        self.model, self.bos, self.device = model, bos, device
        self.context, self.vocab = model.config.context, model.config.vocab_size
        if self.vocab > 1 << 15:
            raise ValueError(f"{ORDER + 1} tokens of a vocabulary of {self.vocab} do not fit a 64-bit key")
        self.counts = [Counts(device) for _ in range(ORDER + 1)]
        self.weights = torch.tensor(WEIGHTS, dtype=torch.float64, device=device)
        self.curvature = CAUTION * torch.eye(len(WEIGHTS), dtype=torch.float64, device=device)
        self.random = torch.Generator().manual_seed(0)
        self.unfinished = torch.empty(0, dtype=torch.int64, device=device)  # the last document, if it goes on

    @torch.inference_mode()
    def predict(self, documents: list[Tensor]) -> Iterator[Tensor]:
        """Logits in blocks (R, V), one row for each token of the documents."""
        a, b, *rest = self.weights.tolist()
        for logits, ngram, caches in self.features(self.pieces(documents)):
            mixed = (a * logits).add_(ngram, alpha=b)
            for c, (index, values) in zip(rest, caches, strict=True):
                mixed.view(-1)[index] += c * values
            yield mixed

    @torch.inference_mode()
    def update(self, documents: list[Tensor]) -> None:
        """Learn from a round that was scored."""
        pieces = self.pieces(documents)
        self.fit(pieces)
        self.count(pieces)
        self.unfinished = pieces[-1][0][-LONGEST:]

    def pieces(self, documents: Sequence[Tensor]) -> list[Piece]:
        """The documents of a round; what was seen of the first one, if it goes on, is put before it."""
        if documents[0][0] == self.bos:
            return [(ids, 0) for ids in documents]
        whole = torch.cat([self.unfinished, documents[0]])
        return [(whole, len(self.unfinished)), *((ids, 0) for ids in documents[1:])]

    def features(self, pieces: Sequence[Piece]) -> Iterator[tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]]:
        """The terms of the mixture for all rows that are asked for, in blocks.

        Logits (R, V), log ngram (R, V), and for each n the flat indices and values where the cache's term is not 0.
        """
        logits = self.logits(pieces)
        wanted = self.wanted(pieces)
        contexts = self.contexts([ids for ids, _ in pieces])
        numbers = torch.arange(len(pieces), device=self.device)
        owner = numbers.repeat_interleave(torch.tensor([len(ids) for ids, _ in pieces], device=self.device))
        tokens = torch.cat([ids for ids, _ in pieces])
        repeats = [
            followers(owner * self.vocab**n + contexts[n], tokens, wanted, most, self.vocab)
            for n, (most, _) in enumerate(CACHE, 1)
        ]
        contexts = [keys[wanted] for keys in contexts]
        for start in range(0, len(logits), BLOCK):
            end = min(start + BLOCK, len(logits))
            ngram = self.ngram([keys[start:end] for keys in contexts])
            caches = []
            for (index, times), (_, k) in zip(repeats, CACHE, strict=True):
                edges = torch.tensor([start * self.vocab, end * self.vocab], device=self.device)
                low, high = torch.searchsorted(index, edges).tolist()
                here = index[low:high] - start * self.vocab
                caches.append((here, torch.log1p(times[low:high] / (k * ngram.view(-1)[here]))))
            yield logits[start:end], ngram.log_(), caches

    def wanted(self, pieces: Sequence[Piece]) -> Tensor:
        """Whether each row (N,) of the pieces is asked for."""
        return torch.cat([torch.arange(len(ids), device=self.device) >= first for ids, first in pieces])

    def logits(self, pieces: Sequence[Piece]) -> Tensor:
        """The model's logits (R, V), from windows that begin at the same places however long the document is."""
        windows: dict[int, list[tuple[Tensor, int]]] = {}
        row = 0
        for ids, first in pieces:
            for start in range(first, len(ids), self.context):
                part = ids[start : start + self.context]
                windows.setdefault(-(-len(part) // 32) * 32, []).append((part, row))
                row += len(part)
        out = torch.empty(row, self.vocab, device=self.device)
        for length, group in windows.items():
            size = max(1, 4096 // length)
            for batch in (group[at : at + size] for at in range(0, len(group), size)):
                ids = torch.full((len(batch), min(length, self.context)), self.bos, device=self.device)
                for line, (part, _) in zip(ids, batch, strict=True):
                    line[: len(part)] = part
                for rows, (part, row) in zip(self.model(ids), batch, strict=True):
                    out[row : row + len(part)] = rows[: len(part)]
        return out

    def contexts(self, documents: Sequence[Tensor]) -> list[Tensor]:
        """For n = 0 ... ORDER the last n tokens of each row as one number (N,), the last one in the lowest digit."""
        keys = [torch.zeros(sum(map(len, documents)), dtype=torch.int64, device=self.device)]
        for n in range(ORDER):
            before = [torch.cat([ids.new_full((n,), self.bos), ids])[: len(ids)] for ids in documents]
            keys.append(keys[-1] + torch.cat(before) * self.vocab**n)
        return keys

    def ngram(self, contexts: Sequence[Tensor]) -> Tensor:
        """Kneser-Ney probabilities (R, V) after contexts (R,) of each order.

        p_n(w) = max(times(w) - D, 0) / total + D * kinds / total * p_(n-1)(w); p_(-1) is uniform. A context that was
        never seen has the distribution of the shorter one.
        """
        p = torch.full((len(contexts[0]), self.vocab), 1 / self.vocab, device=self.device)
        for counts, keys in zip(self.counts, contexts, strict=True):
            low, high = counts.spans(keys, self.vocab)
            kinds = high - low
            total = (counts.sums[high] - counts.sums[low]).clamp(min=1)
            p *= torch.where(kinds > 0, DISCOUNT * kinds / total, 1.0).float()[:, None]
            row = torch.arange(len(keys), device=self.device).repeat_interleave(kinds)
            at = torch.arange(len(row), device=self.device) - (kinds.cumsum(0) - kinds - low)[row]
            share = (counts.times[at] - DISCOUNT) / total[row]
            p.view(-1).index_add_(0, row * self.vocab + counts.keys[at] % self.vocab, share.float())
        return p

    def count(self, pieces: Sequence[Piece]) -> None:
        """Count the tokens of a round after their contexts. What follows the last token is not known yet.

        A shorter context counts in how many longer ones a token was seen (continuation counts): each new key of one
        order is one more occurrence of the key without its oldest token.
        """
        longest = self.contexts([ids for ids, _ in pieces])[ORDER]
        targets = torch.cat([torch.cat([ids[1:], ids.new_full((1,), self.bos)]) for ids, _ in pieces])
        keys = (longest * self.vocab + targets)[self.wanted(pieces)][:-1]
        for n in reversed(range(ORDER + 1)):
            keys = self.counts[n].add(keys) % self.vocab**n

    def fit(self, pieces: Sequence[Piece]) -> None:
        """One step of Newton's method on the weights, over a few windows of the round.

        The code length of a token is convex in the weights: its gradient is the mean of the terms under the mixture
        less the terms of the target, its Hessian their covariance under the mixture. The Hessian is summed up over
        the rounds with slowly fading weight, so steps get smaller but never stop.
        """
        windows = [(ids, start) for ids, first in pieces for start in range(first, len(ids) - 1, self.context)]
        chosen = [i for i, draw in enumerate(torch.rand(len(windows), generator=self.random)) if draw < 1 / SAMPLE]
        ends = [min(start + self.context, len(ids) - 1) for ids, start in windows]
        sample = [(windows[i][0][: ends[i]], windows[i][1]) for i in chosen]
        if not sample:
            return
        target = torch.cat([windows[i][0][windows[i][1] + 1 : ends[i] + 1] for i in chosen])
        self.curvature *= MEMORY
        slope = torch.zeros_like(self.weights)
        for logits, ngram, caches in self.features(sample):
            terms = torch.zeros(*logits.shape, len(WEIGHTS), device=self.device)
            terms[..., 0], terms[..., 1] = logits, ngram
            for n, (index, values) in enumerate(caches, 2):
                terms[..., n].view(-1)[index] = values
            share = (terms @ self.weights.float()).softmax(-1)  # (R, V)
            mean = torch.einsum("rv,rvk->rk", share, terms)
            here, target = target[: len(terms), None, None], target[len(terms) :]
            slope += (mean - terms.take_along_dim(here, 1).squeeze(1)).sum(0)
            terms -= mean[:, None]
            self.curvature += torch.einsum("rv,rvj,rvk->jk", share, terms, terms)
        self.weights -= torch.linalg.solve(self.curvature, slope)


class Counts:
    """How often each key was seen. A key is a context and the token after it: context * V + token."""

    def __init__(self, device: torch.device) -> None:
        self.keys = torch.empty(0, dtype=torch.int64, device=device)  # (N,) ascending
        self.times = torch.empty(0, dtype=torch.float64, device=device)  # (N,)
        self.sums = torch.zeros(1, dtype=torch.float64, device=device)  # (N + 1,) of times, from the start

    def add(self, keys: Tensor) -> Tensor:
        """Count keys (K,), and return those that were new."""
        keys, times = keys.unique(return_counts=True)
        at = torch.searchsorted(self.keys, keys)
        known = torch.cat([self.keys, self.keys.new_full((1,), -1)])[at] == keys
        self.times[at[known]] += times[known]
        new, times, at = keys[~known], times[~known], at[~known]
        inserted = torch.zeros(len(self.keys) + len(new), dtype=torch.bool, device=keys.device)
        inserted[at + torch.arange(len(new), device=keys.device)] = True
        self.keys = merged(inserted, self.keys, new)
        self.times = merged(inserted, self.times, times.double())
        if len(self.keys) > MOST_KEYS:
            self.times = (self.times / 2).floor()
            self.keys, self.times = self.keys[self.times > 0], self.times[self.times > 0]
        self.sums = torch.cat([self.sums[:1], self.times.cumsum(0)])
        return new

    def spans(self, contexts: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
        """Where the keys of contexts (R,) begin and end."""
        return torch.searchsorted(self.keys, contexts * vocab), torch.searchsorted(self.keys, (contexts + 1) * vocab)


def merged(inserted: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """`new` in the places that are marked (N,), `old` in the others."""
    out = old.new_empty(len(inserted))
    out[inserted] = new
    out[~inserted] = old
    return out


def followers(keys: Tensor, tokens: Tensor, wanted: Tensor, most: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Which tokens followed earlier rows with the same key, and how often.

    Of each row that is wanted, its `most` last predecessors among the rows with its key (N,) count. Flat indices
    row * V + token, ascending, rows numbered among the wanted ones, and the times.
    """
    place = torch.arange(len(keys), device=keys.device)
    order = keys.argsort(stable=True)
    grouped = keys[order]
    begins = torch.cat([grouped[:1] < 0, grouped[1:] != grouped[:-1]])
    earlier = place - (place * begins).cummax(0).values
    count = earlier.clamp(max=most) * wanted[order]
    row = place.repeat_interleave(count)
    back = torch.arange(len(row), device=keys.device) - (count.cumsum(0) - count)[row] + 1
    number = (wanted.cumsum(0) - 1)[order[row]]
    index, times = (number * vocab + tokens[order[row - back] + 1]).unique(return_counts=True)
    return index, times.float()
