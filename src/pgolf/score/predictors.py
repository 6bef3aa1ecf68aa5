"""A submission's predictor as the scorer sees it: tokens go into its sandbox, copies of its logits come out."""

import time
from types import TracebackType

import torch
from torch import Tensor
from tqdm import tqdm

from pgolf.artifact import Artifact
from pgolf.errors import Refused
from pgolf.sandbox import wire
from pgolf.sandbox.box import Worker
from pgolf.sandbox.wire import Ids, Kind, Ring
from pgolf.score.devices import Runtime
from pgolf.score.schedule import Step

_DTYPES = {
    wire.Dtype.FLOAT32: torch.float32,
    wire.Dtype.FLOAT16: torch.float16,
    wire.Dtype.BFLOAT16: torch.bfloat16,
}

_LOGITS, _GPU_LOGITS = 4 << 20, 16 << 20
"""Of a batch of windows: on a CPU blocks of 16 MiB in fp32, since the C library gives those of 32 MiB or more back, and
the kernel has to clear the next ones; on a GPU more gained nothing."""


class Predictor:
    """A context manager: entering starts the sandbox, leaving kills it. `load` comes before anything else."""

    def __init__(self, artifact: Artifact, count: int, runtime: Runtime) -> None:
        """`count`: the number of documents or tokens passed to the step form's `load` (see `schedule.count`)."""
        manifest = artifact.manifest
        self.width = manifest.vocab_size
        self.device = runtime.device
        self.window_tokens = max(manifest.context, (_LOGITS if runtime.device == "cpu" else _GPU_LOGITS) // self.width)
        self.submitted = self.received = 0
        self.seconds = {"predictor": 0.0, "wire": 0.0}
        most = manifest.lanes if manifest.form == "step" else self.window_tokens
        self.ring = Ring.create(4 * self.width * most)
        arguments = {"lanes": manifest.lanes, "count": count} if manifest.form == "step" else {}
        try:
            if runtime.device != "cpu":
                self.ring.pin()
            self.worker = Worker(
                "predict",
                artifact.members,
                isolated=runtime.isolated,
                device=runtime.device,
                ring=self.ring,
                config={"form": manifest.form, **arguments},
                packages=manifest.packages,
                compiler=manifest.compiler,
            )
        except BaseException:
            self.ring.close()
            raise

    def __enter__(self) -> "Predictor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.worker.close()
        self.ring.close()

    def set_deadline(self, deadline: float) -> None:
        """From now on waiting past `deadline`, a value of time.monotonic(), raises TimeoutError."""
        self.worker.channel.deadline = deadline

    def load(self, plan: int | None = None) -> int | None:
        """Wait until the predictor is loaded; returns the plan that it follows, or None in the window form.

        `plan`: what the predictor of an encoder reported; None: use the plan that this predictor reports.
        """
        ready = self.worker.receive(Kind.READY, wire.PLAN_BYTES)
        if not ready:
            return None
        plan = int.from_bytes(ready, "little") if plan is None else plan
        self.worker.send(Kind.PLAN, plan.to_bytes(wire.PLAN_BYTES, "little"))
        return plan

    def step(self, step: Step) -> Tensor:
        """Logits (B, V) of what follows in each lane."""
        self.submit(step)
        return self.receive(len(step.lane))

    def submit(self, step: Step) -> None:
        """Show each active lane its token."""
        self._send(Kind.STEP, wire.Step(self.submitted, step.lane, step.shown).encode())

    def submit_windows(self, ids: Ids, first: int) -> None:
        """Send windows (B, T), whose logits count from token `first` on; at most `wire.SLOTS` may be outstanding."""
        message = wire.WindowBatch(self.submitted, first, ids.shape[1] - first, ids)
        self._send(Kind.WINDOWS, message.encode())

    def receive(self, rows: int) -> Tensor:
        """A private copy, on this device, of the logits (rows, V) of the oldest outstanding step or batch."""
        start = time.monotonic()
        number = self.received
        try:
            reply = wire.Logits.decode(self.worker.receive(Kind.LOGITS, wire.LOGITS_BYTES))
        except Refused as error:
            raise Refused(f"step {number}: {error}") from None
        arrived = time.monotonic()
        if reply.number != number:
            raise Refused(f"step {number}: the predictor sent logits for step {reply.number}")
        if (reply.rows, reply.width) != (rows, self.width):
            raise Refused(
                f"step {number}: logits of shape ({reply.rows}, {reply.width}) where ({rows}, {self.width}) were due"
            )
        shared = self.ring.slot(number % wire.SLOTS, reply.rows * reply.width * wire.DTYPE_BYTES[reply.dtype])
        logits = torch.frombuffer(shared, dtype=_DTYPES[reply.dtype]).view(rows, self.width)
        copy = logits.to(self.device, copy=True)
        if copy.is_cuda:
            torch.cuda.synchronize(copy.device)  # the copy is complete before anything else is shown
        self.received += 1
        self.seconds["predictor"] += arrived - start
        self.seconds["wire"] += time.monotonic() - arrived
        return copy

    def _send(self, kind: Kind, payload: bytes) -> None:
        start = time.monotonic()
        self.worker.send(kind, payload)
        self.submitted += 1
        self.seconds["wire"] += time.monotonic() - start


def progress(name: str, tokens: int) -> "tqdm[None]":
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(total=tokens, unit="tok", unit_scale=True, desc=name, leave=False, disable=None)
