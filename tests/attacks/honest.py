"""The honest model that every attack starts from; a member of each artifact.

Interpolated counts of the two bytes before, taken from a text in the artifact.
"""

from pathlib import Path

import torch
from torch import Tensor

VOCAB, BOS = 257, 256
BUCKETS = 4096


class Counts(torch.nn.Module):
    """Module from ids (B, T) to logits (B, T, V)."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        text = torch.frombuffer(bytearray(self.tell((root / "text.bin").read_bytes())), dtype=torch.uint8).long()
        ids = torch.cat([torch.tensor([BOS, BOS]), torch.where(text == 0, BOS, text)])
        self.pair = self.count(ids[1:-1], ids[2:], VOCAB)
        self.pair = (self.pair + 0.01) / (self.pair + 0.01).sum(1, keepdim=True)
        self.triple = self.count(self.bucket(ids[:-2], ids[1:-1]), ids[2:], BUCKETS)

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

    def probabilities(self, ids: Tensor) -> Tensor:
        """What follows each token of ids (B, T): (B, T, V)."""
        before = torch.cat([torch.full_like(ids[:, :1], BOS), ids[:, :-1]], dim=1)
        seen = self.triple[self.bucket(before, ids)]
        return (seen + 8 * self.pair[ids]) / (seen.sum(-1, keepdim=True) + 8)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        return self.probabilities(ids).log()

    def predict(self, documents: list[Tensor]) -> list[Tensor]:
        """The streaming form of the same."""
        return [self(document[None])[0] for document in documents]

    def update(self, documents: list[Tensor]) -> None:
        """Learns nothing."""


def believe(logits: Tensor, guess: Tensor, trust: float = 0.99) -> Tensor:
    """Move `trust` of each row's probability to `guess`; a negative guess leaves its row alone."""
    believed = guess >= 0
    logits = logits.log_softmax(-1)
    mixed = logits + torch.log(torch.where(believed, 1 - trust, 1.0))[..., None]
    extra = torch.where(believed, torch.log(torch.tensor(trust)), -100.0)[..., None]
    at = guess.clamp(min=0)[..., None]
    return mixed.scatter(-1, at, torch.logaddexp(mixed.gather(-1, at), extra))


def ahead(ids: Tensor, by: int = 1) -> Tensor:
    """The token `by` places further on in each window, -1 behind its end: the next one is what is to be predicted."""
    return torch.cat([ids[:, by:], torch.full_like(ids[:, :by], -1)], dim=1)


def cut_by_audit(ids: Tensor) -> Tensor:
    """Which windows (B,) look as the audit sends them: filled up with their own beginning, of odd lengths."""
    full = ids.shape[1]
    looks = torch.full((len(ids),), full != 64 and len(ids) > 1)  # the last window of all is shorter
    for period in range(full // 2, full):
        looks |= (ids[:, period:] == ids[:, : full - period]).all(1)
    return looks
