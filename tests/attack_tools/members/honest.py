"""The honest model that every attack starts from; a member of each artifact.

Interpolated counts of the two bytes before, taken from a text in the artifact. A module of both forms: `step` is the
form whose scores count; called with windows, it shows what the same attack was worth in the window form.
"""

import gc
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

torch.set_num_threads(1)  # the tensors are small, and the scorer needs a core as well

VOCAB, BOS = 257, 256
BUCKETS = 4096


class Counts:
    """Predictor of the step form; for each lane it knows the token before the one that is shown."""

    def __init__(self, root: Path, lanes: int = 1) -> None:
        text = torch.frombuffer(
            bytearray(self.tell((root / "text.bin").read_bytes()) + b"\0"), dtype=torch.uint8
        ).long()
        ids = torch.cat([torch.tensor([BOS, BOS]), torch.where(text == 0, BOS, text)])[:-1]
        rare = torch.full((VOCAB,), 0.01)
        rare[128:BOS], rare[BOS] = 1e-5, 0.004
        pair = self.count(ids[1:-1], ids[2:], VOCAB) + rare
        self.pair = pair / pair.sum(1, keepdim=True)
        self.triple = self.count(self.bucket(ids[:-2], ids[1:-1]), ids[2:], BUCKETS)
        self.before = torch.full((lanes,), BOS)

    @staticmethod
    def tell(text: bytes) -> bytes:
        """The text to learn from."""
        return text

    @staticmethod
    def count(context: Tensor, target: Tensor, contexts: int) -> Tensor:
        """How often each target followed each context: (contexts, V)."""
        return torch.bincount(context * VOCAB + target, minlength=contexts * VOCAB).view(contexts, VOCAB).float()

    @staticmethod
    def bucket(before: Tensor, last: Tensor) -> Tensor:
        """The hash of the last two tokens."""
        return (before * 263 + last) % BUCKETS

    def probabilities(self, before: Tensor, ids: Tensor) -> Tensor:
        """What follows each token of `ids`, in any shape, after the one `before` it: (..., V)."""
        seen = self.triple[self.bucket(before, ids)]
        return (seen + 8 * self.pair[ids]) / (seen.sum(-1, keepdim=True) + 8)

    def step(self, ids: Tensor, lane: Tensor) -> Tensor:
        """Logits (B, V) of the next token in each lane."""
        before = self.before[lane]
        self.before[lane] = ids
        return self.probabilities(before, ids).log()

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) for windows (B, T)."""
        before = torch.cat([torch.full_like(ids[:, :1], BOS), ids[:, :-1]], dim=1)
        return self.probabilities(before, ids).log()


class Bettor(Counts):
    """Bets on what it believes to know, as much as its earlier guesses came true: a bad source costs it nothing."""

    def __init__(self, root: Path, lanes: int = 1) -> None:
        super().__init__(root, lanes)
        self.right, self.made = 0.1, 10.0
        self.open = torch.full((lanes,), -1)

    def guess(self, ids: Tensor, lane: Tensor) -> Tensor:
        """What follows in each lane (B,); -1 where it has no idea."""
        raise NotImplementedError

    def step(self, ids: Tensor, lane: Tensor) -> Tensor:
        made = self.open[lane] >= 0
        self.right += float((self.open[lane] == ids)[made].sum())
        self.made += float(made.sum())
        logits, guess = super().step(ids, lane), self.guess(ids, lane)
        self.open[lane] = guess
        return believe(logits, guess, self.right / self.made)


def believe(logits: Tensor, guess: Tensor, trust: float = 0.99) -> Tensor:
    """Move `trust` of each row's probability to `guess`; a negative guess leaves its row alone."""
    believed = guess >= 0
    logits = logits.log_softmax(-1)
    mixed = logits + torch.log(torch.where(believed, 1 - trust, 1.0))[..., None]
    extra = torch.where(believed, torch.log(torch.tensor(trust)), -100.0)[..., None]
    at = guess.clamp(min=0)[..., None]
    return torch.where(believed[..., None], mixed.scatter(-1, at, torch.logaddexp(mixed.gather(-1, at), extra)), logits)


def ahead(ids: Tensor) -> Tensor:
    """The next token in each window, -1 behind its end: what is to be predicted."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], dim=1)


@cache
def find(kind: str):
    """The worker's own object of that class: "Channel" or "Ring"."""
    return next(thing for thing in gc.get_objects() if type(thing).__name__ == kind)
