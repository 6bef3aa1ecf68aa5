"""A trainer in the sandbox, and the clock that it cannot reach.

    start train.py -> it asks for the data: the clock starts -> it sends the artifact: the clock stops

The artifact travels as bytes over the socket, so nothing in the sandbox can change it after the clock. Then everything
in the sandbox is killed. Before the artifact it may send its log. Each run has fresh copies of all files that it reads,
shards included, and shares nothing with the run before.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pgolf import rules
from pgolf.errors import Refused
from pgolf.sandbox import lock
from pgolf.sandbox.box import Worker, show_output
from pgolf.sandbox.place import Training
from pgolf.sandbox.wire import Kind


@dataclass(frozen=True)
class Job:
    """What to train."""

    sources: Mapping[str, bytes]
    """train.py and the modules that it imports."""
    files: Mapping[str, bytes]
    """Of the dataset folder: those that are there from the start."""
    shards: Mapping[str, Path]
    """Training shards by their names in the dataset folder's `shards`."""
    arguments: tuple[str, ...]
    """Of train.py, after --data."""
    packages: tuple[str, ...] = ()
    """Python packages that it imports besides what pgolf needs."""
    compiler: bool = False
    device: str = "cpu"
    """"cpu" or "cuda" (all GPUs)."""
    processes: int = 1
    eager: bool = False
    """torch.compile does nothing: a few steps are taken sooner than they are compiled."""


@dataclass(frozen=True)
class Limits:
    """Of time and size."""

    prepare_seconds: float
    """From the start of train.py to its request for the data."""
    train_seconds: float | None
    """From there to the last byte of the artifact; None: no limit."""
    artifact_bytes: int


@dataclass(frozen=True)
class Trained:
    """What came of it."""

    artifact: bytes
    seconds: Mapping[str, float]
    """"sandbox": to make the sandbox, not charged; "prepare" and "train", which have limits."""
    output: str
    """The end of what it printed: a stranger's words, like the log."""
    log: bytes | None = None
    """None: it sent none."""


class Late(Refused):
    """A limit of time has passed, which may be a busy machine's fault."""

    def __init__(self, phase: str, sentence: str) -> None:
        super().__init__(sentence)
        self.phase = phase
        """"prepare" or "train"."""


def train(job: Job, limits: Limits, *, isolated: bool = True) -> Trained:
    """Run a train.py and take its artifact.

    Raises Refused when it does not hand over an artifact in time (then `Late`), within the limit of bytes or at all,
    and EnvironmentBroken when the sandbox cannot be made here. What it printed and its log go to `box.show_output`.
    """
    with lock.hold():
        called = time.monotonic()
        training = Training(job.files, job.shards, network=job.processes > 1)
        with Worker(
            "train",
            job.sources,
            isolated=isolated,
            device=job.device,
            config={"arguments": job.arguments, "processes": job.processes, "eager": job.eager},
            packages=job.packages,
            compiler=job.compiler,
            training=training,
        ) as worker:
            artifact, log, seconds = _timed(worker, limits, called)
        if log is not None:
            show_output.get()("log", log.decode("utf-8", "replace"))
        return Trained(artifact, seconds, worker.output(), log)  # now that it has ended, all that it printed is read


def _timed(worker: Worker, limits: Limits, called: float) -> tuple[bytes, bytes | None, dict[str, float]]:
    """Artifact, log and seconds as in Trained."""
    started = time.monotonic()
    worker.channel.deadline = started + limits.prepare_seconds
    try:
        worker.receive(Kind.OPEN, 0)
    except TimeoutError:
        sentence = f"train.py did not ask for the data within {limits.prepare_seconds:g} s; compile and warm up less"
        raise Late("prepare", sentence) from None
    opened = time.monotonic()
    worker.channel.deadline = None if limits.train_seconds is None else opened + limits.train_seconds
    log = None
    try:
        worker.reveal()
        worker.send(Kind.OPENED)
        kind, sent = worker.receive_one_of({Kind.ARTIFACT: limits.artifact_bytes, Kind.LOG: rules.TRAIN_LOG_BYTES})
        if kind is Kind.LOG:
            log, sent = sent, worker.receive(Kind.ARTIFACT, limits.artifact_bytes)
    except TimeoutError:
        sentence = f"train.py did not hand over its artifact within {limits.train_seconds:g} s; stop training earlier"
        raise Late("train", sentence) from None
    finished = time.monotonic()
    return sent, log, {"sandbox": started - called, "prepare": opened - started, "train": finished - opened}
