"""A predictor around a trained model that learns from every token that it is shown.

The distribution of the next token w is a log-linear mixture, normalised over the whole vocabulary by the scorer's
softmax like any other logits:

    log p(w) = a * model(w) + b * log ngram(w) + sum over n of c_n * log(1 + times_n(w) / (K_n * ngram(w))) + constant

- model: the logits of the trained artifact's own predictor, naive.py.
- ngram: interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999, equation 24) over what all lanes have
  shown, up to the last update.
- times_n: how often w followed the last n tokens earlier in this lane's document. A cache (Kuhn and De Mori 1990) whose
  counts enter as the ratio of (times + K * ngram) to K * ngram, like unigram rescaling (Kneser, Peters, Klakow 1997).
- the weights a, b, c_1, ...: fitted by Newton steps on the log-loss of some steps' tokens.
"""

import json
from pathlib import Path

import naive
import torch
from torch import Tensor

ORDER = 3  # tokens of context that the counts look at
DISCOUNT = 0.75  # taken off every count, for words not seen in the context
MOST_KEYS = 1 << 21  # per order; then the counts are halved and those below 1 forgotten
CACHE = (3.0, 1.0, 0.5)  # K_n for n = 1, 2, 3
WEIGHTS = (0.8, 0.2, 0.3, 0.3, 0.2)  # to begin with
CAUTION = 300.0  # curvature of the first weights: that of about a hundred tokens
MEMORY = 1 - 1e-4  # of the curvature, from one fitted token to the next
FIT = 16  # the mixture is fitted on the tokens of every 16th step
UPDATE = 512, 4096  # tokens, fewest and most, that are counted together: a sixteenth of those before
LOOK_BACK = 2048  # tokens of a document that the cache looks at


def load(root: Path, device: torch.device, lanes: int, count: int) -> "Predictor":
    """The predictor of the artifact in `root`."""
    manifest = json.loads((root / "submission.json").read_text(encoding="utf-8"))
    model = naive.load(root, device, lanes, count)
    return Predictor(model, manifest["vocab_size"], manifest["bos"], lanes, device)


class Predictor:
    def __init__(self, model: "naive.Predictor", vocab: int, bos: int, lanes: int, device: torch.device) -> None:
        if vocab > 1 << 15:
            raise ValueError(f"{ORDER + 1} tokens of a vocabulary of {vocab} do not fit a 64-bit key")
        self.model, self.vocab, self.bos, self.device = model, vocab, bos, device
        self.counts = [Counts(device) for _ in range(ORDER + 1)]
        self.unigram = torch.full((vocab,), 1 / vocab, device=device)
        self.text = torch.full((lanes, LOOK_BACK), -1, dtype=torch.int16, device=device)  # of each lane's document
        self.place = torch.zeros(lanes, dtype=torch.int64, device=device)  # of the newest token in `text`, a ring
        self.context = torch.full((lanes,), -1, device=device)  # each lane's last ORDER tokens as a number; -1: none
        self.shown: list[Tensor] = []  # keys that are not counted yet
        self.waiting = self.counted = 0  # how many these are, and how many were counted
        self.times = torch.zeros(lanes * vocab, device=device)  # all zero between steps
        self.weights = torch.tensor(WEIGHTS, dtype=torch.float64, device=device)
        self.curvature = CAUTION * torch.eye(len(WEIGHTS), dtype=torch.float64, device=device)
        self.sample: tuple[Tensor, Tensor] | None = None  # terms (B, V, 5) and lanes (B,) of a step to be fitted
        self.steps = 0

    @torch.inference_mode()
    def step(self, ids: Tensor, lane: Tensor) -> Tensor:
        """Logits (B, V) of the next token in each lane (B,), whose last token is in ids (B,)."""
        if self.sample is not None:
            self.fit(*self.sample, ids, lane)
        self.learn(ids, lane)
        logits: Tensor = self.model.step(ids, lane).float()
        ngram = self.ngram(self.context[lane])
        caches = self.caches(lane, ngram)
        ngram.log_()
        self.steps += 1
        self.sample = (self.terms(logits, ngram, caches), lane.clone()) if self.steps % FIT == 0 else None
        a, b, *rest = self.weights.tolist()
        mixed = logits.mul_(a).add_(ngram, alpha=b)
        for c, (cell, value) in zip(rest, caches, strict=True):
            mixed.view(-1)[cell] += c * value  # a cell that is there twice is written twice with the same value
        return mixed

    def learn(self, ids: Tensor, lane: Tensor) -> None:
        """Take up the tokens ids (B,) that the lanes (B,) show."""
        context, first = self.context[lane], ids == self.bos
        self.shown.append((context * self.vocab + ids)[context >= 0])
        self.waiting += len(ids)
        if self.waiting >= min(max(UPDATE[0], self.counted // 16), UPDATE[1]):
            self.count(torch.cat(self.shown))
            self.counted, self.waiting, self.shown = self.counted + self.waiting, 0, []
        beginning = sum(self.bos * self.vocab**n for n in range(ORDER))
        context = (context * self.vocab + ids) % self.vocab**ORDER
        self.context[lane] = torch.where(first, beginning, context)
        self.text[lane[first]] = -1
        self.place[lane] = place = (self.place[lane] + 1) % LOOK_BACK
        self.text[lane, place] = ids.short()
        self.text[lane, (place + 1) % LOOK_BACK] = -1  # between the newest and the oldest

    def caches(self, lane: Tensor, ngram: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For n = 1, 2, 3 the flat indices (M,) where the cache's term is not 0, some twice, and its values there."""
        text = self.text if len(lane) == len(self.text) else self.text[lane]  # (B, L)
        place, found, times = self.place[lane], [], self.times[: ngram.numel()]
        lines = torch.arange(len(lane), device=self.device)
        same = text == text[lines, place][:, None]
        same[lines, place] = False  # what follows the newest is not known
        row, at = same.nonzero().unbind(1)
        for n, k in enumerate(CACHE, 1):
            if n > 1:
                longer = text[row, at - n + 1] == text[row, place[row] - n + 1]
                row, at = row[longer], at[longer]
            cell = row * self.vocab + text[row, (at + 1) % LOOK_BACK]
            times.index_add_(0, cell, torch.ones_like(cell, dtype=times.dtype))
            found.append((cell, torch.log1p(times[cell] / (k * ngram.view(-1)[cell]))))
            times[cell] = 0
        return found

    def ngram(self, context: Tensor) -> Tensor:
        """Kneser-Ney probabilities (B, V) after contexts (B,) of ORDER tokens.

        p_n(w) = max(times(w) - D, 0) / total + D * distinct / total * p_(n-1)(w); p_(-1) is uniform. A context that was
        never seen has the distribution of the shorter one.
        """
        p = self.unigram.expand(len(context), -1).clone()
        for n, counts in enumerate(self.counts[1:], 1):
            counts.interpolate(p, context % self.vocab**n)
        return p

    def count(self, keys: Tensor) -> None:
        """Count tokens after their contexts; keys (K,) are numbers of ORDER + 1 tokens, the last in the lowest digit.

        A shorter context counts in how many longer ones a token was seen (continuation counts): each new key of one
        order is one more occurrence of the key without its oldest token.
        """
        for n in reversed(range(ORDER + 1)):
            keys = self.counts[n].add(keys, self.vocab) % self.vocab**n
        self.unigram = torch.full((1, self.vocab), 1 / self.vocab, device=self.device)
        self.counts[0].interpolate(self.unigram, torch.zeros(1, dtype=torch.int64, device=self.device))

    def terms(self, logits: Tensor, ngram: Tensor, caches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The terms of the mixture (B, V, 5)."""
        terms = torch.zeros(*logits.shape, len(WEIGHTS), device=self.device)
        terms[..., 0], terms[..., 1] = logits, ngram
        for n, (cell, value) in enumerate(caches, 2):
            terms[..., n].view(-1)[cell] = value
        return terms

    def fit(self, terms: Tensor, lanes: Tensor, ids: Tensor, lane: Tensor) -> None:
        """One step of Newton's method on the weights, over the tokens ids (B,) that followed `terms` in these lanes.

        The log-loss of a token is convex in the weights: its gradient is the mean of the terms under the mixture less
        the terms of the target, its Hessian their covariance under the mixture. The Hessian is summed up over all fits
        with slowly fading weight, so steps get smaller but never stop.
        """
        still = torch.isin(lanes, lane)  # a lane that has ended shows nothing any more
        terms = terms[still]
        target = ids[torch.searchsorted(lane, lanes[still]), None, None]
        share = (terms @ self.weights.float()).softmax(-1)  # (B, V)
        mean = torch.einsum("rv,rvk->rk", share, terms)
        slope = (mean - terms.take_along_dim(target, 1).squeeze(1)).sum(0)
        terms -= mean[:, None]
        self.curvature *= MEMORY ** len(terms)
        self.curvature += torch.einsum("rvj,rvk->jk", share[..., None] * terms, terms)
        self.weights -= torch.linalg.solve(self.curvature, slope.double())


class Counts:
    """How often each key was seen. A key is a context and the token after it: context * V + token."""

    def __init__(self, device: torch.device) -> None:
        self.keys = torch.empty(0, dtype=torch.int64, device=device)  # (N,) ascending
        self.times = torch.empty(0, dtype=torch.float64, device=device)  # (N,)
        self.contexts = torch.empty(0, dtype=torch.int64, device=device)  # (C,) ascending
        self.kinds = self.starts = self.contexts  # (C,) keys of each context, and where they begin
        self.rest = self.times  # (C,) share of each context that goes to the shorter one
        self.share = self.times  # (N,) of its context that each key has
        self.word = self.keys  # (N,) the token of each key

    def add(self, keys: Tensor, vocab: int) -> Tensor:
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
        self.contexts, which, self.kinds = (self.keys // vocab).unique_consecutive(
            return_inverse=True, return_counts=True
        )
        self.starts = self.kinds.cumsum(0) - self.kinds
        total = torch.zeros(len(self.contexts), dtype=torch.float64, device=keys.device).index_add_(
            0, which, self.times
        )
        self.rest = (DISCOUNT * self.kinds / total).float()
        self.share = ((self.times - DISCOUNT) / total[which]).float()
        self.word = self.keys % vocab
        return new

    def interpolate(self, p: Tensor, context: Tensor) -> None:
        """Turn p (B, V), in place, from probabilities after shorter contexts into those after contexts (B,)."""
        if not len(self.contexts):
            return
        at = torch.searchsorted(self.contexts, context).clamp_(max=len(self.contexts) - 1)
        row = (self.contexts[at] == context).nonzero().squeeze(1)
        at = at[row]
        scale = torch.ones(len(p), device=p.device)
        scale[row] = self.rest[at]
        p *= scale[:, None]
        kinds = self.kinds[at]
        cell = (row * p.size(1)).repeat_interleave(kinds)
        entry = torch.arange(len(cell), device=p.device) + (
            self.starts[at] - kinds.cumsum(0) + kinds
        ).repeat_interleave(kinds)
        p.view(-1).index_add_(0, cell + self.word[entry], self.share[entry])


def merged(inserted: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """`new` in the places that are marked (N,), `old` in the others."""
    out = old.new_empty(len(inserted))
    out[inserted] = new
    out[~inserted] = old
    return out
