"""Training batches: the shards as one endless stream of tokens, cut into batches in order.

Global batch k is tokens k*N to (k+1)*N of the stream, with N = `batch_tokens`, and each rank takes an equal,
contiguous slice of its sequences. So every world size sees the same batches, and each rank copies only its part.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pgolf.data.shards import Shard, Tokens


def batches(
    shards: Sequence[Shard],
    vocab_size: int,
    batch_tokens: int,
    context: int,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and targets, each (B, T) int64 on `device`, with T = `context` and B = batch_tokens / T / world.

    Targets are the ids one further in the stream. After the last shard comes the first again. No shard is
    opened before the first batch is requested. Raises EnvironmentBroken when a shard is damaged.
    """
    own = batch_tokens // world
    if own % context or own * world != batch_tokens:
        raise ValueError(f"{batch_tokens} tokens do not split into {world} times sequences of {context}")
    pinned = torch.device(device).type == "cuda"

    def ready(tokens: Tokens) -> Tensor:
        ids = torch.from_numpy(tokens.astype(np.int64)).view(-1, context)
        return (ids.pin_memory() if pinned else ids).to(device, non_blocking=True)

    for span in _spans(shards, vocab_size, batch_tokens, rank * own, (rank + 1) * own + 1):
        yield ready(span[:-1]), ready(span[1:])


def _spans(shards: Sequence[Shard], vocab_size: int, step: int, start: int, stop: int) -> Iterator[Tokens]:
    """Tokens k*step + start to k*step + stop of the endless stream, for k = 0, 1, 2, ...

    The shard after next is opened, and with that read and checked, while the one before it is in use.
    """
    cycle = itertools.cycle(shards)
    held: list[Tokens] = []
    with ThreadPoolExecutor(1) as opener:
        upcoming = opener.submit(next(cycle).read, vocab_size)
        while True:
            while sum(map(len, held)) < stop:
                held.append(upcoming.result())
                upcoming = opener.submit(next(cycle).read, vocab_size)
            yield _cut(held, start, stop)
            start, stop = start + step, stop + step
            while held and start >= len(held[0]):
                start, stop = start - len(held[0]), stop - len(held[0])
                del held[0]


def _cut(pieces: Sequence[Tokens], start: int, stop: int) -> Tokens:
    """Tokens `start` to `stop` of the pieces laid end to end."""
    parts: list[Tokens] = []
    for piece in pieces:
        parts.append(piece[max(start, 0) : max(stop, 0)])
        start, stop = start - len(piece), stop - len(piece)
    return np.concatenate(parts)
