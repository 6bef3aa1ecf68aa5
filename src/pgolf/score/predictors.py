"""Predict workers: windows or rounds of tokens go into their boxes, full rows of logits come out.

A predictor of the simple form answers questions about windows, several boxes side by side. One of the streaming
form lives in one box and is shown the text round by round: the next round leaves this process only when every
row of the one before is here.
"""

import select
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pgolf.artifact import Artifact
from pgolf.errors import Refused
from pgolf.sandbox import wire
from pgolf.sandbox.box import Worker
from pgolf.sandbox.wire import Ids, Kind, Ring, Wanted
from pgolf.score.windows import Index, Plan

SLOT_BYTES = 64 * 1024 * 1024  # logits of one batch; larger batches gain nothing on any device we measured

Floats = npt.NDArray[np.float64]

_DTYPES = {
    wire.Dtype.FLOAT32: torch.float32,
    wire.Dtype.FLOAT16: torch.float16,
    wire.Dtype.BFLOAT16: torch.bfloat16,
}


@dataclass(frozen=True)
class Question:
    """Windows `ids` (B, T); asked for are rows `first[b]` to `first[b] + count` of each."""

    ids: Ids
    first: Ids
    count: int


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln softmax(logits)[target] per row, in nats: (R, V), (R,) -> (R,) float64; NaN for a row that is not finite.

    The exponentials are summed in fp64: in fp32 a row could hide many small terms from the sum, and its
    probabilities would add up to more than one.
    """
    # A CPU does this in pieces that stay in its cache, at twice the speed.
    rows = max(1, len(logits) if logits.is_cuda else (1 << 18) // logits.shape[-1])
    parts = zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    return torch.cat([_negative_log_likelihood(*part) for part in parts])


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.float()
    least, peak = logits.aminmax(dim=-1)
    total = torch.exp(logits - peak[:, None]).sum(dim=-1, dtype=torch.float64)
    target = logits.gather(-1, targets[:, None]).squeeze(-1)
    nll = torch.log(total) + (peak.double() - target.double())
    return nll.where(torch.isfinite(least) & torch.isfinite(peak), torch.nan)


class Lane:
    """A predict worker in its box, and the ring that its logits come through."""

    def __init__(self, artifact: Artifact, device: str, slot_bytes: int, deadline: float, isolated: bool) -> None:
        """`deadline` is a value of time.monotonic(); past it every wait raises TimeoutError."""
        self.width = artifact.manifest.vocab_size
        self.device = device
        self.deadline = deadline
        self.ring = Ring.create(max(slot_bytes, 4 * self.width))
        self.worker = Worker(
            "predict",
            artifact.members,
            deadline=deadline,
            isolated=isolated,
            device=device,
            ring=self.ring,
            config={"streaming": artifact.manifest.form == "streaming"},
            packages=artifact.manifest.packages,
        )

    def close(self) -> None:
        """Kill the worker."""
        self.worker.close()
        self.ring.close()

    def ask(self, number: int, slot: int, question: Question) -> None:
        """Send a question, to be answered in `slot`."""
        message = wire.Batch(number, slot, question.count, question.first, question.ids)
        self.worker.send(Kind.BATCH, message.encode())

    def answer(self, number: int, slot: int, rows: int) -> Tensor:
        """The answer to question `number`: logits (rows, V)."""
        logits = self._rows(f"batch {number}", number, slot)
        if len(logits) != rows:
            raise Refused(f"batch {number}: {len(logits)} rows of logits where {rows} were asked for")
        return logits

    def show(self, number: int, documents: Sequence[Ids], last: bool = False) -> Iterator[Tensor]:
        """Show round `number`; yields blocks of logits (R, V), a row a token or only the `last` of each document."""
        due = len(documents) if last else sum(map(len, documents))
        self.worker.send(Kind.ROUND, wire.Round(Wanted.LAST if last else Wanted.ROWS, list(documents)).encode())
        block = 0
        while due:
            logits = self._rows(f"round {number}", block, block % wire.SLOTS)
            self.worker.send(Kind.TAKEN)
            if not 0 < len(logits) <= due:
                raise Refused(f"round {number}: a block of {len(logits)} rows of logits where {due} are still due")
            due -= len(logits)
            block += 1
            yield logits

    def update(self, documents: Sequence[Ids]) -> None:
        """Let the predictor learn from documents whose every row was received."""
        self.worker.send(Kind.ROUND, wire.Round(Wanted.UPDATE, list(documents)).encode())
        self.worker.receive(Kind.READY, 0)

    def _rows(self, where: str, number: int, slot: int) -> Tensor:
        """A private copy of the next block of logits, on this lane's device: it cannot change once checked."""
        try:
            reply = wire.Rows.decode(self.worker.receive(Kind.ROWS, wire.ROWS_BYTES))
        except Refused as error:
            raise Refused(f"{where}: {error}") from None
        if (reply.number, reply.slot) != (number, slot):
            raise Refused(f"{where}: the predictor answered something else ({reply.number} in slot {reply.slot})")
        if reply.width != self.width:
            raise Refused(f"{where}: rows of {reply.width} logits, but vocab_size is {self.width}")
        shared = self.ring.slot(slot, reply.rows * reply.width * wire.DTYPE_BYTES[reply.dtype])
        if not reply.rows:
            return torch.empty(0, self.width)
        logits = torch.frombuffer(shared, dtype=_DTYPES[reply.dtype]).view(reply.rows, reply.width)
        return logits.to(self.device, copy=True)


@contextmanager
def open_lanes(
    artifact: Artifact, plan: Plan, devices: Sequence[str], deadline: float, isolated: bool
) -> Iterator[list[Lane]]:
    """Loaded workers for what the plan asks: one per device, or one that sees everything. All are killed at the end."""
    slot_bytes = SLOT_BYTES
    if artifact.manifest.form == "streaming":
        devices = devices[:1]
    else:
        slot_bytes = max(SLOT_BYTES, 4 * artifact.manifest.vocab_size * int(plan.rounds[0].length.max()))
    with ExitStack() as stack:
        lanes = []
        for device in devices:
            lanes.append(Lane(artifact, device, slot_bytes, deadline, isolated))
            stack.callback(lanes[-1].close)
        for lane in lanes:
            lane.worker.receive(Kind.READY, 0)
        yield lanes


def answers(lanes: Sequence[Lane], questions: Iterable[Question]) -> Iterator[tuple[int, Tensor]]:
    """Ask all questions of whoever is free; yields (index of the question, logits (B * count, V)) as they come."""
    queue = enumerate(questions)
    pending: dict[Lane, deque[tuple[int, int, int]]] = {lane: deque() for lane in lanes}

    def ask(lane: Lane, slot: int) -> None:
        if upcoming := next(queue, None):
            number, question = upcoming
            pending[lane].append((number, slot, len(question.first) * question.count))
            lane.ask(number, slot, question)

    for slot in range(wire.SLOTS):
        for lane in lanes:
            ask(lane, slot)
    while busy := [lane for lane in lanes if pending[lane]]:
        for lane in _readable(busy):
            number, slot, rows = pending[lane].popleft()
            logits = lane.answer(number, slot, rows)
            ask(lane, slot)
            yield number, logits


def _readable(lanes: Sequence[Lane]) -> list[Lane]:
    """The lanes that have something to say; waits until one has."""
    left = max(0.0, lanes[0].deadline - time.monotonic())
    ready, _, _ = select.select([lane.worker.channel.socket for lane in lanes], [], [], left)
    if not ready:
        raise TimeoutError
    return [lane for lane in lanes if lane.worker.channel.socket in ready]


def code_lengths(logits: Tensor, stream: Ids, rows: Index) -> Floats:
    """Code lengths in nats (R,) of the stream's tokens after positions `rows` (R,) under logits (R, V).

    Raises Refused where a row holds NaN or infinity.
    """
    targets = torch.from_numpy(stream[rows + 1].astype(np.int64)).to(logits.device)
    nll: Floats = negative_log_likelihood(logits, targets).cpu().numpy()
    if bad := rows[np.isnan(nll)].tolist():
        raise Refused(f"the logits row for token {bad[0]} of the stream holds NaN or infinity")
    return nll
