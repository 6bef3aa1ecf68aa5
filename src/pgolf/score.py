"""The scorer: `python -m pgolf.score artifact.zst`.

    read artifact -> encode the canonical text -> decode it again -> plan windows -> sum the code length

bpb = total bits that the model needs to code the validation text, divided by the text's UTF-8 bytes. The text,
the byte count, the targets, the softmax, the sum and the clock live in this process; the submission runs in
boxes (`sandbox`) and only ever returns full rows of logits over its vocabulary.
"""

import argparse
import importlib.metadata
import json
import math
import re
import select
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from pgolf import record, rules, tokenizer, windows, wire
from pgolf.artifact import Artifact, read
from pgolf.data.dataset import CanonicalText, default_dataset, open_dataset
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.sandbox import Worker, check_isolation
from pgolf.wire import Kind, Ring, WireError

SLOT_BYTES = 64 * 1024 * 1024  # logits of one batch; larger batches gain nothing on any device we measured

_DTYPES = {
    wire.Dtype.FLOAT32: torch.float32,
    wire.Dtype.FLOAT16: torch.float16,
    wire.Dtype.BFLOAT16: torch.bfloat16,
}


@dataclass
class Timer:
    """The evaluation clock: seconds per phase, and one deadline for everything the submission does."""

    limit: float
    deadline: float
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase. Raises Refused in place of a TimeoutError from a worker's channel."""
        start = time.monotonic()
        try:
            yield
        except TimeoutError:
            raise Refused(f"the evaluation took longer than its {self.limit:g} s (ended during {name})") from None
        finally:
            self.seconds[name] = round(time.monotonic() - start, 3)


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-ln softmax(logits)[target] per row, in nats: (R, V), (R,) -> (R,) float64; NaN for a row that is not finite.

    The exponentials are summed in fp64: in fp32 a row could hide many small terms from the sum, and its
    probabilities would add up to more than one.
    """
    logits = logits.float()
    least, peak = logits.aminmax(dim=-1)
    total = torch.exp(logits - peak[:, None]).sum(dim=-1, dtype=torch.float64)
    target = logits.gather(-1, targets[:, None]).squeeze(-1)
    nll = torch.log(total) + (peak.double() - target.double())
    return nll.where(torch.isfinite(least) & torch.isfinite(peak), torch.nan)


def predict(
    artifact: Artifact,
    documents: Sequence[wire.Ids],
    devices: Sequence[str],
    timer: Timer,
    isolated: bool,
) -> npt.NDArray[np.float64]:
    """Code length in nats (N,) of every target of the stream, in order (see `windows`)."""
    manifest = artifact.manifest
    stream, boundaries = windows.stream(documents, manifest.bos)
    plan = windows.plan(boundaries, manifest.window, manifest.context, manifest.stride or manifest.context)
    row_bytes = 4 * manifest.vocab_size
    slot_bytes = max(SLOT_BYTES, row_bytes * int(plan.length.max()))
    queue = deque(enumerate(windows.batches(plan, slot_bytes // row_bytes)))
    nll = np.full(len(stream) - 1, np.nan)
    with ExitStack() as stack:
        with timer.phase("load"):
            lanes = [stack.enter_context(_Lane(artifact, d, slot_bytes, timer, isolated)) for d in devices]
            for lane in lanes:
                lane.worker.receive(Kind.READY, 0)
        with timer.phase("predict"), tqdm(total=len(nll), unit="tok", unit_scale=True, desc="score") as bar:
            for slot in range(wire.SLOTS):
                for lane in lanes:
                    lane.submit(queue, stream, slot)
            while busy := [lane for lane in lanes if lane.pending]:
                for lane in _readable(busy, timer):
                    batch, slot, logits = lane.collect(manifest.vocab_size)
                    lane.submit(queue, stream, slot)
                    rows = batch.positions()[:, batch.first :].reshape(-1)
                    targets = torch.from_numpy(stream[rows + 1].astype(np.int64)).to(logits.device)
                    nll[rows] = negative_log_likelihood(logits, targets).cpu().numpy()
                    if bad := rows[np.isnan(nll[rows])].tolist():
                        raise Refused(f"the logits row for token {bad[0]} of the stream holds NaN or infinity")
                    bar.update(len(rows))
    return nll


class _Lane:
    """A predict worker with its ring, and the batches that it owes, oldest first."""

    def __init__(self, artifact: Artifact, device: str, slot_bytes: int, timer: Timer, isolated: bool) -> None:
        self.device = device
        self.ring = Ring.create(slot_bytes)
        self.pending: deque[tuple[int, int, windows.Batch]] = deque()
        self.worker = Worker(
            "predict",
            artifact.members,
            deadline=timer.deadline,
            isolated=isolated,
            device=device,
            ring=self.ring,
        )

    def __enter__(self) -> "_Lane":
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()
        self.ring.close()

    def submit(self, queue: deque[tuple[int, windows.Batch]], stream: wire.Ids, slot: int) -> None:
        """Send the next batch of the queue, if there is one, to be answered in `slot`."""
        if queue:
            number, batch = queue.popleft()
            self.pending.append((number, slot, batch))
            message = wire.Batch(number, slot, batch.first, stream[batch.positions()])
            self.worker.send(Kind.BATCH, message.encode())

    def collect(self, vocab_size: int) -> tuple[windows.Batch, int, torch.Tensor]:
        """The answer to the oldest batch: the batch, its slot, and a private copy of its logits (R, V)."""
        number, slot, batch = self.pending.popleft()
        rows = len(batch.start) * (batch.length - batch.first)
        reply = wire.Rows.decode(self.worker.receive(Kind.ROWS, wire.ROWS_BYTES))
        if (reply.number, reply.slot) != (number, slot):
            raise Refused(f"batch {number}: the predictor answered another batch ({reply.number})")
        if reply.width != vocab_size:
            raise Refused(f"batch {number}: rows of {reply.width} logits, but vocab_size is {vocab_size}")
        if reply.rows != rows:
            raise Refused(f"batch {number}: {reply.rows} rows of logits where {rows} were asked for")
        shared = self.ring.slot(slot, rows * vocab_size * wire.DTYPE_BYTES[reply.dtype])
        logits = torch.frombuffer(shared, dtype=_DTYPES[reply.dtype]).view(rows, vocab_size)
        return batch, slot, logits.to(self.device, copy=True)


def _readable(lanes: Sequence[_Lane], timer: Timer) -> list[_Lane]:
    """The lanes that have something to say; waits until one has. Raises TimeoutError past the deadline."""
    left = max(0.0, timer.deadline - time.monotonic())
    ready, _, _ = select.select([lane.worker.channel.socket for lane in lanes], [], [], left)
    if not ready:
        raise TimeoutError
    return [lane for lane in lanes if lane.worker.channel.socket in ready]


def score(
    path: Path,
    data: Path,
    track_name: str | None = None,
    device: str = "auto",
    documents: int | None = None,
    isolated: bool = True,
) -> record.Record:
    """Score the artifact at `path` on the validation text of `data`.

    Returns the record: status "ok", or "refused" (the submission breaks a rule) or "failed" (this machine or the
    data is not fit) with the reason. Raises UsageError when there is nothing to score.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such artifact")
    devices = _devices(device)
    started = time.monotonic()
    result: record.Record = {
        "status": "failed",
        "reason": None,
        "eligible": False,
        "bpb": None,
        "nats_per_token": None,
        "tokens": None,
        "bytes": None,
        "documents": None,
        "track": track_name,
        "submission": None,
        "artifact": {"sha256": None, "bytes": path.stat().st_size},
        "data": None,
        "isolation": None,
        "seconds": {},
        "environment": record.environment(devices[0]),
        "audit": None,
    }
    try:
        _score(result, path, data, devices, documents, isolated)
        result["status"] = "ok"
        result["eligible"] = isolated and documents is None
    except Refused as error:
        result.update(status="refused", reason=str(error))
    except WireError as error:
        result.update(status="refused", reason=f"the submission broke the wire protocol: {error}")
    except EnvironmentBroken as error:
        result.update(status="failed", reason=str(error))
    result["seconds"]["total"] = round(time.monotonic() - started, 3)
    return result


def _score(
    result: record.Record,
    path: Path,
    data: Path,
    devices: Sequence[str],
    sample: int | None,
    isolated: bool,
) -> None:
    """Fill `result` step by step, so that a refusal keeps what was known by then."""
    limit = max(t.artifact_bytes for t in rules.TRACKS.values())
    if result["track"] is not None:
        limit = rules.track(result["track"]).artifact_bytes
    artifact = read(path, limit)
    manifest = artifact.manifest
    track = rules.track(result["track"] or manifest.track)
    result["track"] = track.name
    result["submission"] = {"name": manifest.name, "author": manifest.author}
    result["artifact"] = {"sha256": artifact.sha256, "bytes": artifact.size}
    _check_packages(manifest.packages)
    result["isolation"] = check_isolation() if isolated else "none"
    dataset = open_dataset(data)
    text = dataset.canonical_text()
    result["data"] = {"name": dataset.name, "sha256": text.sha256}
    if sample is not None:
        text = CanonicalText(text.documents[:sample])
    result.update(documents=len(text.documents), bytes=text.bytes)
    if not text.bytes:
        raise EnvironmentBroken(f"{data}: the validation text is empty")

    timer = Timer(track.eval_seconds, time.monotonic() + track.eval_seconds, result["seconds"])
    with timer.phase("encode"):
        encoded = tokenizer.encode(artifact, text.documents, timer.deadline, isolated)
    with timer.phase("decode"):
        tokenizer.check_decoding(artifact, text.documents, encoded, timer.deadline, isolated)
    nll = predict(artifact, encoded, devices, timer, isolated)

    nats = math.fsum(nll)
    result.update(tokens=len(nll), nats_per_token=nats / len(nll), bpb=nats / math.log(2) / text.bytes)


def _check_packages(packages: Sequence[str]) -> None:
    for name in packages:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise Refused(f"the submission needs the package {name}, which this environment lacks") from None


def _devices(device: str) -> list[str]:
    """One entry per worker. Raises UsageError for a device that is not here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return ["cpu"]
    if not (match := re.fullmatch(r"cuda(?::(\d+))?", device)):
        raise UsageError(f"there is no device {device!r}; use cpu, cuda (all GPUs) or cuda:N")
    count = torch.cuda.device_count()
    index = int(match[1]) if match[1] else 0
    if index >= count:
        raise UsageError(f"device {device} is not here: torch {torch.__version__} sees {count} GPUs")
    return [device] if match[1] else [f"cuda:{i}" for i in range(count)]


def table(result: record.Record) -> str:
    """The record for people."""
    if result["status"] != "ok":
        return f"{result['status']}: {result['reason']}"
    limits = rules.track(result["track"])
    seconds = result["seconds"]
    phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total")
    lines = {
        "submission": f"{result['submission']['name']} by {result['submission']['author']}, track {limits.name}",
        "artifact": f"{result['artifact']['bytes']:,} of {limits.artifact_bytes:,} bytes, "
        f"sha256 {result['artifact']['sha256'][:16]}",
        "text": f"{result['data']['name']}: {result['documents']:,} documents, {result['bytes']:,} bytes",
        "tokens": f"{result['tokens']:,} scored, {result['bytes'] / result['tokens']:.3f} bytes per token",
        "seconds": f"{sum(v for k, v in seconds.items() if k != 'total'):.1f} of {limits.eval_seconds:g} ({phases})",
        "isolation": result["isolation"],
        "loss": f"{result['nats_per_token']:.6f} nats per token",
        "score": f"{result['bpb']:.6f} bpb" + ("" if result["eligible"] else "  (not eligible: a trial)"),
    }
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of the scorer."""
    parser.add_argument("artifact", type=Path, help="the submission: one .zst file")
    parser.add_argument("--data", type=Path, help="dataset folder (default: the only one in ./data)")
    parser.add_argument("--track", choices=rules.TRACKS, help="score under this track's limits, not its own")
    parser.add_argument("--device", default="auto", help="cpu, cuda (all GPUs), cuda:N (default: what is there)")
    parser.add_argument("--documents", type=_positive, metavar="N", help="only the first N: a trial, not eligible")
    parser.add_argument("--no-sandbox", action="store_true", help="run code you trust unboxed: not eligible")
    parser.add_argument("--out", type=Path, help="the record (default: artifact.score.json beside the artifact)")
    parser.add_argument("--json", action="store_true", help="print the record to standard output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Score, write the record, print it; returns the exit code."""
    data = args.data or default_dataset()
    out = args.out or args.artifact.with_suffix(".score.json")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder for the record")
    open_dataset(data)
    result = score(args.artifact, data, args.track, args.device, args.documents, not args.no_sandbox)
    record.write(result, out)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(table(result), file=sys.stdout if result["status"] == "ok" else sys.stderr)
    return {"ok": 0, "refused": Refused.exit_code, "failed": EnvironmentBroken.exit_code}[result["status"]]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


DESCRIPTION = "Check an artifact against the limits of its track and compute its bits per byte, in a sandbox."
EPILOG = """\
example:
  python -m pgolf.score artifact.zst --data data/demo

exit codes: 0 scored, 1 the submission is refused, 2 wrong usage, 3 this machine or the data is broken
"""


if __name__ == "__main__":
    from pgolf.cli import main

    sys.exit(main(["score", *sys.argv[1:]]))
